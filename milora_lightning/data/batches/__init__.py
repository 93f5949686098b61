"""Batches: choosing, ordering and distributing examples, and collating them to tensors."""
