"""Checkpoint formats: readers and writers."""
