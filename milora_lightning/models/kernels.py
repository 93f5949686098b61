"""Liger's Triton kernels for the operations between the matrix products of a decoder layer."""

from __future__ import annotations

import importlib
import importlib.util
import inspect

import torch
from transformers import PreTrainedModel

from milora_lightning.utils.errors import InvalidInputError, MissingPackageError


def apply_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Make a model compute its norms, rotary embeddings and gated activations with Liger's kernels.

    Liger's cross-entropies are not used: this package computes the loss for supervised tokens only, and never all
    logits at once. Liger replaces functions of transformers' module for all models of this type in the process.

    Args:
        model: The model; changed in place.
        device: The device that it will train on.

    Raises:
        ModuleNotFoundError: If liger-kernel is not installed.
        ValueError: If the device is not a GPU, or Liger has no kernels for the model.
    """
    if device.type not in ("cuda", "xpu"):
        raise InvalidInputError(f"liger: true needs a GPU, for which its kernels are written, not {device.type}.")
    if importlib.util.find_spec("liger_kernel") is None:
        raise MissingPackageError('liger: true needs the package liger-kernel: pip install "milora-lightning[liger]"')
    kind = model.config.model_type
    apply = getattr(importlib.import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{kind}", None)
    if apply is None:
        raise InvalidInputError(f"Liger has no kernels for models of type {kind}: leave model.liger out.")
    losses = ("cross_entropy", "fused_linear_cross_entropy")
    apply(model=model, **dict.fromkeys([name for name in losses if name in inspect.signature(apply).parameters], False))
