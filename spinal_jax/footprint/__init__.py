"""Two checkpoints that are both at hand: their traces on the same tokens, and what only both together give."""
