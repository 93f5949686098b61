"""Checks before surgery changes anything."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from milora_lightning.adapters.fused_checks import check_parts
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import holds_its_weight, is_linear
from milora_lightning.adapters.parts import TargetNotFoundError, modules_by_name
from milora_lightning.adapters.settings import configured_settings, first_difference, settings_of
from milora_lightning.config import LoRAConfig
from milora_lightning.parallel.dtensor import is_sharded
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.patterns import ends_in


def check_injection(
    part: nn.Module,
    targets: Mapping[str, nn.Module],
    present: Mapping[str, LoRALinear],
    saved: Sequence[nn.Module],
    config: LoRAConfig,
) -> None:
    """Check that adapters can be injected.

    Args:
        part: The module, or the part of it that ``config.module`` names.
        targets: The layers that are to get adapters.
        present: The adapters that the module has already.
        saved: The modules that are to train in full.
        config: The configuration of the adapters.

    Raises:
        TargetNotFoundError: If a key of a pattern matches no layer with an adapter.
        ValueError: If adapters of another configuration exist, a target's weight is sharded, or a weight in ``saved``
            is quantized.
    """
    _check_one_part(present, part, config)
    _check_same_config(present, config)
    _check_patterns([*targets, *present], config)
    for name, layer in targets.items():
        _check_not_sharded(name, layer)
        check_parts(name, layer, config, part)
    for each in saved:
        _check_trainable(each)


def check_no_peft(module: nn.Module) -> None:
    """Refuse a model to which PEFT has added adapters."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # imported if somebody has called get_peft_model
    for name, child in module.named_modules():
        if peft is not None and isinstance(child, peft.BaseTunerLayer):
            raise InvalidInputError(
                f"The model already carries PEFT layers, such as {name!r}: leave out get_peft_model, as the adapters "
                "injected here take their place and can be exported for PEFT afterwards; or leave out MiLoRAInit, and "
                "call milora_lightning.initialize_peft(model) after get_peft_model."
            )


def check_materialized(module: nn.Module, kept: Collection[nn.Module] = ()) -> None:
    """Refuse lazy layers that have no weights yet.

    Raises:
        TargetNotFoundError: If there are any, other than in modules that train in full.
    """
    for name, child in modules_by_name(module).items():
        lazy = [p for p in child._parameters.values() if p is not None and is_lazy(p)]
        if lazy and child not in kept:
            raise TargetNotFoundError(
                f"Layer {name!r} ({type(child).__name__}) has no weights yet that could be adapted or frozen: run a "
                "dummy batch through the module before fit, for example at the end of its __init__."
            )


def _check_one_part(present: Mapping[str, LoRALinear], part: nn.Module, config: LoRAConfig) -> None:
    inside = set(part.modules())
    outside = [name for name, layer in present.items() if layer not in inside]
    if outside:
        raise InvalidInputError(
            f"Layer {outside[0]!r} has an adapter already and is outside of module={config.module!r}, but a checkpoint "
            "holds the adapters of one part. Adapt both by one configuration, without module or with what holds both: "
            "target_modules and exclude_modules say which layers, rank_pattern which have other ranks."
        )


def _check_same_config(present: Mapping[str, LoRALinear], config: LoRAConfig) -> None:
    for name, layer in present.items():
        has, wanted = settings_of(layer), configured_settings(config, name, layer.out_features)
        if key := first_difference(has, wanted):
            raise InvalidInputError(
                f"Layer {name!r} has an adapter with {key}={has[key]} already, and {key}={wanted[key]} is asked for. "
                "Start from a fresh model, or use the configuration it was injected with."
            )


def _check_patterns(names: Collection[str], config: LoRAConfig) -> None:
    for option in ("rank_pattern", "alpha_pattern", "fused_parts"):
        for key in getattr(config, option):
            if not any(ends_in(name, key) for name in names):
                raise TargetNotFoundError(f"The key {key!r} of {option} matches the name of no layer with an adapter.")


def _check_not_sharded(name: str, layer: nn.Module) -> None:
    if is_sharded(layer):
        raise InvalidInputError(
            f"The weight of layer {name!r} is sharded already, too late for adapters: in configure_model, call "
            "milora_lightning.inject(model, LoRAConfig(...)) before fully_shard, with the same settings as MiLoRAInit."
        )


def _check_trainable(saved: nn.Module) -> None:
    for layer in saved.modules():
        weight = layer._parameters.get("weight")
        if not is_linear(layer) or weight is None or weight.is_complex():
            continue
        if not holds_its_weight(layer):
            raise InvalidInputError(
                f"modules_to_save means a {type(layer).__name__} whose weight is quantized and cannot train in full: "
                "leave it out, or load the model with this part unquantized."
            )
