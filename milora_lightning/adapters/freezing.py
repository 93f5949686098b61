"""Freezing a model, and remembering what its user had frozen before."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from milora_lightning.adapters.layer import LoRALinear

TRAINED_BEFORE = "_trained_before_surgery"
"""Attribute of modules whose parameters were trainable until :func:`freeze` froze them."""


def freeze(part: nn.Module, kept: Collection[nn.Module]) -> None:
    """Freeze everything in a module except the modules that train in full.

    Args:
        part: The module.
        kept: The modules that train in full, with all modules inside them.
    """
    for child in part.modules():
        trains = any(p is not None and p.requires_grad for p in child._parameters.values())
        if trains and child not in kept and not isinstance(child, LoRALinear):
            setattr(child, TRAINED_BEFORE, True)
    for parameter in part.parameters():
        parameter.requires_grad_(False)
    for child in kept:
        for parameter in child._parameters.values():  # type: ignore[assignment]
            if parameter is not None:
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())


def frozen_by_user(layer: nn.Module) -> bool:
    """Whether all parameters of a layer, not counting its children, were frozen by somebody other than this package.

    Quantized weights cannot train, so they do not count as frozen by the user.
    """
    if isinstance(layer, LoRALinear) or getattr(layer, TRAINED_BEFORE, False):
        return False
    parameters = [p for p in layer._parameters.values() if p is not None]
    return bool(parameters) and all(
        p.is_floating_point() and p.dtype.itemsize > 1 and not p.requires_grad for p in parameters
    )


def anything_trains(module: nn.Module, kept: Collection[nn.Module]) -> bool:
    """Whether a module had trainable parameters before surgery, other than those in ``kept``."""
    others = (m for m in module.modules() if m not in kept and not isinstance(m, LoRALinear))
    return any(
        getattr(m, TRAINED_BEFORE, False) or any(p is not None and p.requires_grad for p in m._parameters.values())
        for m in others
    )


def base_keys(module: nn.Module, frozen_only: bool = True) -> set[str]:
    """Return the names, wrappers included, of all parameters that are not adapters' factors; by default frozen ones.

    Args:
        module: A module with adapters.
        frozen_only: Whether to leave out parameters that train.
    """
    factors = {
        f"{prefix}.{name}"
        for prefix, layer in module.named_modules()
        if isinstance(layer, LoRALinear)
        for name, _ in layer.named_parameters(recurse=False)
    }
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, p in parameters if not (frozen_only and p.requires_grad)} - factors
