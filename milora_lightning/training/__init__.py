"""Training and evaluating a module: its model, optimizer steps, learning rates, resuming, averaging, metrics."""
