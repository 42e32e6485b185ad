"""One checkpoint on a set of prompts: hidden states to sums, sums to spectra, both to a depth trace."""
