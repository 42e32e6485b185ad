"""Error bars and tests over groups of prompts."""
