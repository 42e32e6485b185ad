"""Depth traces during training by other programs: from folders of checkpoints, or from parameters in memory."""
