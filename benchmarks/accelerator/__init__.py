"""What this project does on one GPU: `python -m benchmarks.accelerator`."""
