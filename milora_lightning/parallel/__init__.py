"""Tensors in shards, and work shared out among ranks."""
