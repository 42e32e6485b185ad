"""One checkpoint on a pool of prompts: hidden states to sums, sums to spectra, both to a depth curve."""
