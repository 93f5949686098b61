"""Injection: wrap each target layer in a LoRALinear and freeze everything else. No arithmetic is done.

:func:`milora_lightning.inject` (``adapters/surgery.py``) is built on it: it selects and checks the targets, and handles
BatchNorm, quantized weights and modules that train in full.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from milora_lightning.adapters.freezing import freeze
from milora_lightning.adapters.kinds import adapter_for, replacements
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
    """Wrap layers in adapters and freeze the rest.

    Args:
        module: Any module; changed in place.
        targets: The layers that get adapters, by name.
        config: The configuration of the adapters.
        part: The submodule that is frozen; by default the whole module.
        kept: Modules inside it that train in full.

    Returns:
        All adapters of the module by name.
    """
    part = module if part is None else part
    freeze(part, kept)
    adapters = {layer: adapter_for(layer, name, config) for name, layer in targets.items()}
    _replace(module, replacements(module, adapters))
    for adapter in lora_layers(part).values():
        adapter.train_factors()
    return lora_layers(module)


def _replace(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they are registered, which may be in several places and inside wrappers."""
    for parent in list(module.modules()):
        for key, child in list(parent._modules.items()):  # named_children would skip a second registration
            new = None if child is None else replacements.get(child)
            if new is not None and new is not parent:
                setattr(parent, key, new)
                bind_compiled(parent)


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapters of a module by name, without the prefixes that ``torch.compile`` and other wrappers add.

    >>> lora_layers(nn.Linear(2, 2))
    {}
    """
    return {unwrapped_name(name): layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}
