"""Surgery on a whole model: checks, then injection, then what BatchNorm, quantized and fully trained modules need."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from milora_lightning.adapters.candidates import layers_named
from milora_lightning.adapters.checks import check_injection, check_materialized, check_no_peft
from milora_lightning.adapters.coverage import experts_adapted, remarks
from milora_lightning.adapters.frozen_statistics import freeze_statistics
from milora_lightning.adapters.injection import inject_adapters, lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.master_weights import keep_master_weights
from milora_lightning.adapters.new_layers import saved_modules
from milora_lightning.adapters.parts import find_part, modules_inside
from milora_lightning.adapters.quantization import keep_codes_in_place
from milora_lightning.adapters.targets import select_layers
from milora_lightning.config import LoRAConfig
from milora_lightning.utils.messages import inform_once, warn_once


def inject(module: nn.Module, config: LoRAConfig, layers: Sequence[str] | None = None) -> dict[str, LoRALinear]:
    """Put a :class:`LoRALinear` around every target layer, and freeze everything else.

    No arithmetic is done, so it works on the meta device; the module's function does not change. Everything is
    checked before anything is changed. Layers that already have an adapter of the same configuration are left alone,
    so injecting twice is injecting once. Follow it with :func:`milora_lightning.initialize`.

    Frozen means frozen: BatchNorm, and other layers with running statistics, use those of the pretrained model in
    training, too, and do not change them, unless they are in ``modules_to_save``. Modules in ``modules_to_save`` are
    kept in float32 and compute in the dtype they had.

    Args:
        module: Any module; changed in place.
        config: Which layers, which rank, which start.
        layers: The full names of exactly the layers that get adapters (those of a checkpoint, for example), instead of
            the targets of ``config``.

    Returns:
        All adapters of the module by name.

    Raises:
        ValueError: If a target name matches nothing or no linear layer, ``r`` exceeds a target's size, a target's
            weight is sharded already or tied to another layer's, or there are adapters of another configuration.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> sorted(inject(model, LoRAConfig(r=2, target_modules=["0"])))
    ['0']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A', '0.lora_B']
    """
    adapters = inject_quietly(module, config, layers)
    for remark in remarks(module, config) if layers is None else ():
        warn_once(module, remark)
    if layers is None and (experts := experts_adapted(module)) is not None:
        inform_once(module, experts)
    return adapters


def inject_quietly(module: nn.Module, config: LoRAConfig, layers: Sequence[str] | None = None) -> dict[str, LoRALinear]:
    """Do what :func:`inject` does without remarks on what is left out: parts of the module may not exist yet."""
    check_no_peft(module)
    part = find_part(module, config.module)
    saved = saved_modules(part, config)
    kept = modules_inside(saved)
    check_materialized(part, kept)
    selected = layers_named(module, layers) if layers is not None else select_layers(module, config, kept).layers
    targets = {name: layer for name, layer in selected.items() if not isinstance(layer, LoRALinear)}
    check_injection(part, targets, lora_layers(module), saved, config)

    adapters = inject_adapters(module, targets, config, part, kept)
    freeze_statistics(part, kept)
    keep_codes_in_place(module)
    keep_master_weights(module, saved)
    return adapters


def freeze_again(module: nn.Module, config: LoRAConfig) -> None:
    """Freeze the statistics of layers that have been replaced since surgery."""
    part = find_part(module, config.module)
    freeze_statistics(part, modules_inside(saved_modules(part, config)))
