"""Injection: each target layer is wrapped in a LoRALinear, and everything else is frozen. No arithmetic is done.

:func:`milora_lightning.inject` is built on it. It chooses the targets, checks them, and takes care of BatchNorm,
quantized weights and modules that train in full (``adapters/surgery.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from milora_lightning.adapters.experts import is_stack, wrap_stacks
from milora_lightning.adapters.freezing import freeze
from milora_lightning.adapters.kinds import adapter_class
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.config import LoRAConfig
from milora_lightning.utils.compat.torch import bind_compiled
from milora_lightning.utils.names import unwrapped_name


def inject_adapters(
    module: nn.Module,
    targets: Mapping[str, nn.Module],
    config: LoRAConfig,
    part: nn.Module | None = None,
    kept: Collection[nn.Module] = (),
) -> dict[str, LoRALinear]:
    """Wrap layers in adapters, and freeze the rest.

    Args:
        module: Any module; changed in place.
        targets: The layers that get adapters, by name.
        config: Rank, scale, dropout and start of the adapters.
        part: The part of the module that is frozen; by default all of it.
        kept: The modules in it that train in full.

    Returns:
        All adapters of the module by name.
    """
    part = module if part is None else part
    freeze(part, kept)
    _wrap(module, targets, config)
    for adapter in lora_layers(part).values():
        adapter.train_factors()
    return lora_layers(module)


def _wrap(module: nn.Module, targets: Mapping[str, nn.Module], config: LoRAConfig) -> None:
    """Replace each target by its adapter wherever it is registered (a layer may be in several places)."""
    wrap_stacks(module, {name: layer for name, layer in targets.items() if is_stack(layer)}, config)
    adapters = {}
    for name, layer in targets.items():
        if is_stack(layer):
            continue
        options = config.lora_dropout, config.init, config.dropout_on
        adapters[layer] = adapter_class(layer)(layer, config.rank(name), config.alpha(name), *options)
        adapters[layer].train(layer.training)
    for parent in list(module.modules()):
        if isinstance(parent, LoRALinear):
            continue
        for key, child in list(parent._modules.items()):  # named_children would skip a second registration
            if child in adapters:
                setattr(parent, key, adapters[child])
                bind_compiled(parent)


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapters of a module by name, without the names that compilation and other wrappers add.

    >>> lora_layers(nn.Linear(2, 2))
    {}
    """
    return {unwrapped_name(name): layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


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
