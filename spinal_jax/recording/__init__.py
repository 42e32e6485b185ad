"""Depth traces in training that is not ours: folders of checkpoints, and parameters in memory."""
