"""Training that records its depth traces on the way."""
