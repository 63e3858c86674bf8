"""Training: setup, the loop, the steps, the optimizer, the reference, metrics and the workdir."""
