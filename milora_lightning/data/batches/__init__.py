"""Which examples make a batch, in which order, on which rank, and as which tensors."""
