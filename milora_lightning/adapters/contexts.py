"""Contexts in which a module's adapters are disabled or merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from milora_lightning.adapters.injection import lora_layers


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Within this context, the module computes without its adapters, bit for bit as before surgery.

    Modules that train in full, such as those in ``modules_to_save``, keep their current values.

    Args:
        module: A module with or without adapters.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> with adapters_disabled(model):
    ...     pass
    """
    layers = list(lora_layers(module).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@contextmanager
def adapters_merged(module: nn.Module) -> Iterator[None]:
    """Within this context, each adapter's update is merged with its weight; see :meth:`LoRALinear.merge`.

    For generation. The base weights are not modified, outputs stay the same up to float32 rounding (bit for bit on a
    half-precision base), and training, checkpoints and :func:`adapters_disabled` work as before.

    Args:
        module: A module with or without adapters.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> with adapters_merged(model):
    ...     pass
    """
    layers = [layer for layer in lora_layers(module).values() if not layer.merged]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.unmerge()
