"""Surgery on a whole model: checks, injection, and the handling of BatchNorm, quantized and fully trained modules."""

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
    """Wrap every target layer in a :class:`LoRALinear` and freeze everything else.

    No arithmetic is done, so this works on the meta device, and the module still computes the same function. Everything
    is checked before anything is changed. Layers that already have an adapter of the same configuration are left alone,
    so a second call changes nothing. Call :func:`milora_lightning.initialize` next.

    BatchNorm and other layers with running statistics are frozen, too: even in training they use the pretrained model's
    statistics without updating them, unless they are in ``modules_to_save``. Modules in ``modules_to_save`` are kept in
    float32 and compute in their former dtype.

    Args:
        module: Any module; changed in place.
        config: The configuration of the adapters.
        layers: Full names of the layers that get adapters, for example those of a checkpoint, instead of the targets of
            ``config``.

    Returns:
        All adapters of the module by name.

    Raises:
        ValueError: If a target name matches no layer that can be adapted, ``r`` exceeds a target's size, a target's
            weight is already sharded or is tied to another layer's, or there are adapters of another configuration.

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
    """Do the same as :func:`inject`, without remarks on layers left out: parts of the module may not exist yet.

    Args:
        module: Any module; changed in place.
        config: The configuration of the adapters.
        layers: As for :func:`inject`.
    """
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
    """Freeze the statistics of layers that were replaced after surgery.

    Args:
        module: A module with adapters; changed in place.
        config: The configuration they were injected with.
    """
    part = find_part(module, config.module)
    freeze_statistics(part, modules_inside(saved_modules(part, config)))
