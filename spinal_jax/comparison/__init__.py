"""Two or more depth traces: how they differ, where, and how sure that is."""
