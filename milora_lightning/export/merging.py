"""Merging updates into the weights, and measuring the rounding error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_lightning.adapters.experts import AdaptedExperts
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import holds_its_weight
from milora_lightning.adapters.master_weights import compute_dtypes
from milora_lightning.adapters.packed import LoRAPacked
from milora_lightning.export.models import registrations
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import unwrapped_name

FACTORS = ("lora_A", "lora_B", "initial_A", "initial_B")


@torch.no_grad()
def merged_state(
    model: PreTrainedModel,
    dtype: torch.dtype | None,
    only: tuple[str, ...] = ("",),
    corrections: Mapping[LoRALinear, tuple[Tensor, Tensor]] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Return the state dict of a model with its adapters merged.

    Args:
        model: The model; it is not changed.
        dtype: Dtype of all floating-point tensors; by default each keeps its dtype.
        only: Return only tensors whose names have one of these prefixes.
        corrections: Factors (out, n) and (n, in) of corrections that are added to the ΔW of some adapters.

    Returns:
        The state dict, and the relative rounding error of ΔW: ‖round(W + ΔW) − W − ΔW‖_F / ‖ΔW‖_F.

    Raises:
        ValueError: If a number is too large for the dtype.
    """
    places, trained = registrations(model), compute_dtypes(model)  # modules trained in full are held in float32
    state: dict[str, Any] = {}
    casts: dict[tuple[Any, ...], Tensor] = {}  # tied weights stay tied
    errors = energies = 0.0
    for wrapped_key, value in model.state_dict().items():
        key = unwrapped_name(wrapped_key)
        if is_factor(key, places) or not key.startswith(only):
            continue
        name, _, leaf = key.rpartition(".base_layer.")
        if (packed := key.removesuffix("_weight")) in places and isinstance(places[packed], LoRAPacked):
            state[key], error, energy = _merge(packed, places[packed], dtype, corrections)
            errors, energies = errors + error, energies + energy
            continue
        adapter = name if name in places else f"{name}.{leaf}"  # of a layer, or of a stack of experts' weights
        if name and adapter in places and (adapter != name or leaf == "weight"):
            state[f"{name}.{leaf}"], error, energy = _merge(adapter, places[adapter], dtype, corrections)
            errors, energies = errors + error, energies + energy
        elif name:
            # A shared layer is saved in each of its places, because transformers does not know that it is shared.
            state[f"{name}.{leaf}"] = _cast(key, value, dtype).clone()
        else:
            identity = (value.data_ptr(), value.shape, value.stride()) if isinstance(value, Tensor) else (key,)
            if identity not in casts:
                casts[identity] = _cast(key, value, dtype or trained.get(key))
            state[key] = casts[identity]
    return state, (errors / energies) ** 0.5 if energies else 0.0


@torch.no_grad()
def merge_adapters(model: nn.Module) -> float:
    """Add each adapter's update to its weight, and replace the adapter by the plain layer.

    Args:
        model: A model with or without adapters; changed in place.

    Returns:
        The relative rounding error of ΔW, as :func:`merged_state` returns it.

    Raises:
        ValueError: If a weight is quantized. Nothing is changed then.
    """
    layers = registrations(model)
    if any(not holds_its_weight(layer.base_layer) for layer in layers.values()):
        raise InvalidInputError("A quantized model cannot be merged without rounding it again: leave merge out.")
    errors = energies = 0.0
    for layer, name in {layer: name for name, layer in layers.items()}.items():
        weight, error, energy = _merge(name, layer, None)
        layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
        errors, energies = errors + error, energies + energy
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # a layer may be in several places
            if isinstance(child, LoRAPacked):
                del parent._modules[key]
            elif isinstance(child, (LoRALinear, AdaptedExperts)) and not isinstance(parent, AdaptedExperts):
                setattr(parent, key, child.base_layer)
    return (errors / energies) ** 0.5 if energies else 0.0


def _merge(
    name: str,
    layer: LoRALinear,
    dtype: torch.dtype | None,
    corrections: Mapping[LoRALinear, tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, float, float]:
    """Return W + ΔW, added in the factors' precision and rounded once, and ‖·‖²_F of the rounding error and of ΔW."""
    weight = layer.base_layer.weight.detach()
    delta = layer.delta_weight()
    if corrections and layer in corrections:
        left, right = corrections[layer]
        delta = delta + left @ right
    delta = layer.as_weight(delta)
    exact = weight.to(delta.dtype) + delta
    rounded = _cast(name, exact, dtype or weight.dtype)
    error = (rounded.to(delta.dtype) - weight.to(delta.dtype)) - delta
    return rounded, error.double().square().sum().item(), delta.double().square().sum().item()


def _cast(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return value
    rounded = value.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max and rounded.isinf().sum() > value.isinf().sum():
        raise InvalidInputError(
            f"{name!r} has values up to {value.abs().max():.3g}, and the largest of {dtype} is "
            f"{torch.finfo(dtype).max:.3g}: choose dtype float32 or bfloat16."
        )
    return rounded


def is_factor(name: str, layers: Mapping[str, LoRALinear]) -> bool:
    """Whether a parameter's name belongs to an adapter's factor."""
    layer, _, factor = name.rpartition(".")
    return layer in layers and factor in FACTORS


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype given by name, or the dtype itself; None stays None.

    Raises:
        ValueError: If a model cannot be saved in this dtype.

    >>> as_dtype("bfloat16")
    torch.bfloat16
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise InvalidInputError(f"dtype must be float32, bfloat16 or float16, not {dtype!r}.")
    return found


def rounding_note(lost: float) -> str | None:
    """Return a note on how much of the updates was lost by rounding; None if it is negligible.

    >>> rounding_note(0.224)
    "Rounding the merged weights has cost 22.4% of the updates' norm: dtype float32 keeps all of it."
    """
    if lost < 0.001:
        return None
    return f"Rounding the merged weights has cost {lost:.1%} of the updates' norm: dtype float32 keeps all of it."
