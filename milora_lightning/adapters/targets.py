"""Target layers: which layers of a model get adapters, and which are left out, with the reason."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from milora_lightning.adapters.experts import is_of_experts, is_stack, routers, stacked_weights
from milora_lightning.adapters.freezing import anything_trains, frozen_by_user
from milora_lightning.adapters.held_weight import holder
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_adaptable, is_embedding, is_linear
from milora_lightning.adapters.misfits import misfit
from milora_lightning.adapters.parts import TargetNotFoundError, ends_with, excluded_names, find_part, first_few
from milora_lightning.adapters.target_errors import FROZEN, TOO_SMALL, no_match, no_parameter, nothing_left, refusal
from milora_lightning.adapters.tied import parameter_owners
from milora_lightning.config import ALL_LINEAR, LoRAConfig
from milora_lightning.starts import find_start
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import unwrapped_name


@dataclass(frozen=True)
class Selection:
    """The layers that a configuration selects in a model.

    Attributes:
        layers: The layers that get or have adapters, by name.
        left_out: Layers that ``target_modules`` matches but that get no adapter, with the reason by name.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def find_targets(
    module: nn.Module, target_modules: str | Sequence[str], exclude_modules: str | Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Find the layers that match and have no adapter yet, whether or not they can have one.

    A layer that is registered under several names counts under its first.

    Args:
        module: Any module.
        target_modules: As in :class:`LoRAConfig`.
        exclude_modules: As in :class:`LoRAConfig`.

    Returns:
        The layers by name; empty only if all targets have adapters already.

    Raises:
        TargetNotFoundError: If something in ``target_modules`` matches no linear layer; lists what there is.

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "mlp": nn.ModuleDict({"up": nn.Linear(2, 2)})})
    >>> [sorted(find_targets(model, targets)) for targets in (["up"], r"q_.*", "all-linear")]
    [['mlp.up'], ['q_proj'], ['mlp.up', 'q_proj']]
    """
    excluded = excluded_names(module, exclude_modules)
    found: dict[str, nn.Module] = {}
    for entry in [target_modules] if isinstance(target_modules, str) else target_modules:
        found |= _matches(module, entry, not isinstance(target_modules, str))
    return {n: m for n, m in found.items() if n not in excluded and not isinstance(m, LoRALinear)}


def layers_named(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers of these full names, those with adapters as their LoRALinear.

    Raises:
        TargetNotFoundError: If there is no linear layer of one of the names.
    """
    layers, names = adaptable_layers(module), [unwrapped_name(name) for name in names]
    missing = [name for name in names if name not in layers]
    if missing:
        find_targets(module, missing)  # raises an error that lists the existing layers
        raise TargetNotFoundError(f"{type(module).__name__} has no linear layer {first_few(missing)}.")
    return {name: layers[name] for name in names}


def select_layers(module: nn.Module, config: LoRAConfig, kept: Collection[nn.Module] = ()) -> Selection:
    """Decide which layers get adapters.

    Layers that the user has frozen while other parameters train serve another purpose (a teacher, a reward model, a
    perceptual loss). They get no adapters, unless a name or regular expression matches frozen layers only. Where
    nothing trains, being frozen means nothing.

    Args:
        module: Any module.
        config: What is asked for.
        kept: Modules that train in full.

    Returns:
        The layers, and what is left out.

    Raises:
        TargetNotFoundError: If a name matches no linear layer, or nothing is left.
        ValueError: If a layer that was named cannot have an adapter of this rank.
    """
    part, targets = find_part(module, config.module), config.target_modules
    named = not isinstance(targets, str)  # a list of names, where the user means each of them
    excluded = excluded_names(part, config.exclude_modules)
    prefix = f"{config.module}." if config.module else ""
    owners, training = parameter_owners(module), anything_trains(part, kept)
    selection = Selection()
    every = [(str(entry), named, _matches(part, str(entry), named)) for entry in (targets if named else [targets])]
    every += [(entry, True, _parameters_named(part, entry)) for entry in config.target_parameters]
    for entry, named, matches in every:
        matches = {n: m for n, m in matches.items() if n not in excluded and holder(m) not in kept}
        frozen = {n for n, m in matches.items() if n != entry and frozen_by_user(m)}
        skip_frozen = training and ((entry == ALL_LINEAR and not named) or len(frozen) < len(matches))
        for name_in_part, layer in matches.items():
            name = prefix + name_in_part
            r = config.rank(name)
            reason = FROZEN if skip_frozen and name_in_part in frozen else misfit(layer, r, owners)
            if reason == TOO_SMALL and named and find_start(config.init).any_rank:
                reason = None  # LoRA needs no singular triplets, and PEFT allows its adapters any rank
            if reason is None:
                selection.layers[name] = layer
            elif named and reason != FROZEN:
                raise InvalidInputError(refusal(name, layer, r, reason))
            else:
                selection.left_out[name] = reason
    if not selection.layers:
        raise TargetNotFoundError(nothing_left(module, config, selection.left_out))
    for name in [name for name in selection.layers if name in selection.left_out]:
        del selection.left_out[name]  # another entry has selected it
    if targets == ALL_LINEAR:
        for name in _without_weight(part, kept):
            if name not in excluded:
                selection.left_out[prefix + name] = "computes its weight (weight_norm?)"
    return selection


def _matches(module: nn.Module, entry: str, is_name: bool) -> dict[str, nn.Module]:
    """Find the layers that one entry of ``target_modules`` describes, those with adapters as their LoRALinear."""
    layers = adaptable_layers(module)
    if is_name:
        name = unwrapped_name(entry)
        found = {n: layer for n, layer in layers.items() if n == name or (ends_with(n, name) and not _is_stack(layer))}
        what = f"target_modules entry {entry!r}"
    elif entry == ALL_LINEAR:
        heads = output_heads(module)
        linear = {n: m for n, m in layers.items() if is_linear(_base(m))}
        found = {n: m for n, m in linear.items() if _base(m) not in heads and not ends_with(n, "lm_head")}
        experts = {n: m for n, m in layers.items() if is_stack(stack := _base(m)) and is_of_experts(n, stack)}
        frozen = routers(found, experts)
        found = {n: m for n, m in found.items() if n not in frozen} | experts
        what = f'target_modules="{ALL_LINEAR}"'
    else:
        found = {n: layer for n, layer in layers.items() if re.fullmatch(entry, n) and not _is_stack(layer)}
        found = {n: m for n, m in found.items() if not is_embedding(_base(m))} or found  # unless embeddings are meant
        what = f"regular expression target_modules={entry!r}"
    if not found:
        raise TargetNotFoundError(no_match(module, what, layers, entry if is_name else None))
    return found


def adaptable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return all layers with a weight that adapters fit, by name; those with adapters as their LoRALinear."""
    bases = {child.base_layer for child in module.modules() if isinstance(child, LoRALinear)}
    layers: dict[str, nn.Module] = {}
    for wrapped_name, child in module.named_modules():
        name = unwrapped_name(wrapped_name)
        fitting = name and is_adaptable(child) and child not in bases
        if isinstance(child, LoRALinear) or (fitting and child._parameters.get("weight") is not None):
            layers[name] = child
    return layers | cast(dict[str, nn.Module], stacked_weights(module))


def _without_weight(module: nn.Module, kept: Collection[nn.Module]) -> list[str]:
    """Name the linear layers whose weight is no parameter but computed from others."""
    layers = ((n, m) for n, m in module.named_modules() if is_linear(m) and m not in kept)
    return [unwrapped_name(name) for name, layer in layers if name and layer._parameters.get("weight") is None]


def output_heads(module: nn.Module) -> set[nn.Module | None]:
    """Return the output embeddings of all language models within a module."""
    transformers = sys.modules.get("transformers.modeling_utils")  # not imported: then there is no such model
    if transformers is None:
        return set()
    models = (m for m in module.modules() if isinstance(m, transformers.PreTrainedModel))
    return {_base(head) for m in models if isinstance(head := m.get_output_embeddings(), nn.Module)}


def _parameters_named(module: nn.Module, entry: str) -> dict[str, nn.Module]:
    """Find what an entry of ``target_parameters`` names: stacks, or layers by their weights."""
    layers = adaptable_layers(module)
    found = {n: layer for n, layer in layers.items() if ends_with(n if _is_stack(layer) else f"{n}.weight", entry)}
    if not found:
        raise TargetNotFoundError(no_parameter(module, entry, [n for n, layer in layers.items() if _is_stack(layer)]))
    return found


def _is_stack(layer: nn.Module) -> bool:
    return is_stack(_base(layer))


def _base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LoRALinear) else layer
