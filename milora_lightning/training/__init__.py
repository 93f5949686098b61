"""Training and evaluating a module: optimizer steps, learning rates, resuming, averaging, metrics."""
