"""Tensors in, tensors out: parts of singular spectra, exactly."""

from milora_lightning.linalg.singular import SingularSlice, singular_slice

__all__ = ["SingularSlice", "singular_slice"]
