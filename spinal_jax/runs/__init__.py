"""Run folders: writing, finding and tabulating them."""
