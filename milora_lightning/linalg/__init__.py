"""Tensors in, tensors out: exact parts of singular value decompositions."""

from milora_lightning.linalg.singular import SingularSlice, singular_slice

__all__ = ["SingularSlice", "singular_slice"]
