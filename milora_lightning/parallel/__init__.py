"""Sharded tensors, and work distributed over ranks."""
