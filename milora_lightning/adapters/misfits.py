"""Reasons why a layer cannot have an adapter although its kind can."""

from __future__ import annotations

from torch import Tensor, nn

from milora_lightning.adapters.experts import is_stack, objection_to
from milora_lightning.adapters.held_weight import holder
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import (
    PLAIN_LAYERS,
    PLAIN_TENSORS,
    groups_of,
    is_convolution,
    is_embedding,
    is_plain,
    largest_rank,
)
from milora_lightning.adapters.packed import is_packed
from milora_lightning.adapters.target_errors import TOO_SMALL, UNEVEN
from milora_lightning.adapters.tied import Owners, tied_to


def misfit(layer: nn.Module, r: int, owners: Owners) -> str | None:
    """Return the reason why a layer cannot have an adapter of rank r; None if it can or already has one.

    Args:
        layer: The layer.
        r: Rank of the adapter.
        owners: The result of :func:`milora_lightning.adapters.tied.parameter_owners` for the whole model.
    """
    if isinstance(layer, LoRALinear):
        return None
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    if is_stack(layer) and (objection := objection_to(layer)):
        return objection
    if is_packed(layer) and not is_plain(weight):
        return "holds quantized codes"
    if weight.is_complex():
        return "has complex weights"
    known = type(layer) in PLAIN_LAYERS or is_convolution(layer) or is_embedding(layer)
    if known and type(weight) in PLAIN_TENSORS and not is_plain(weight):
        return f"has weights of {weight.dtype}"
    if r % groups_of(layer):
        return UNEVEN
    if r > largest_rank(layer):
        return TOO_SMALL
    others = tied_to(holder(layer), weight, owners)
    return f"is tied to {', '.join(others)}" if others else None
