"""Contexts in which the adapters of a module compute otherwise: not at all, or merged with their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from milora_lightning.adapters.injection import lora_layers


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Within this context, the module computes what it did before surgery, bit for bit.

    What ``modules_to_save`` has trained in full, or other parts that train, stay as they are now.

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
    """Within this context, each adapter's update is merged with its weight: see :meth:`LoRALinear.merge`.

    For generation. The base weights are not written, outputs stay the same to float32's rounding (bit for bit on a
    half-precision base), and training, checkpoints and :func:`adapters_disabled` work as before.

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
