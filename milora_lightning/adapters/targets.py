"""Target selection: which layers of a model get adapters, and why others do not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from milora_lightning.adapters.candidates import (
    adaptable_layers,
    all_linear,
    called,
    holding_parameters,
    matching,
    without_weight,
)
from milora_lightning.adapters.freezing import anything_trains, frozen_by_user
from milora_lightning.adapters.held_weight import holder
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.misfits import misfit
from milora_lightning.adapters.parts import TargetNotFoundError, excluded_names, find_part
from milora_lightning.adapters.target_errors import FROZEN, TOO_SMALL, no_match, nothing_left, refusal
from milora_lightning.adapters.tied import parameter_owners
from milora_lightning.config import ALL_LINEAR, LoRAConfig
from milora_lightning.starts import find_start
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import unwrapped_name


@dataclass(frozen=True)
class Selection:
    """The layers of a model that a configuration selects.

    Attributes:
        layers: The selected layers by name, including those that have adapters already.
        left_out: The reason by name for layers that ``target_modules`` matches but that get no adapter.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def find_targets(
    module: nn.Module, target_modules: str | Sequence[str], exclude_modules: str | Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Find the matching layers that have no adapter yet, whether or not they can have one.

    A layer that is registered under several names appears under the first one.

    Args:
        module: Any module.
        target_modules: As in :class:`LoRAConfig`.
        exclude_modules: As in :class:`LoRAConfig`.

    Returns:
        The layers by name; empty only if all targets have adapters already.

    Raises:
        TargetNotFoundError: If an entry of ``target_modules`` matches no linear layer; lists the existing ones.

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "mlp": nn.ModuleDict({"up": nn.Linear(2, 2)})})
    >>> [sorted(find_targets(model, targets)) for targets in (["up"], r"q_.*", "all-linear")]
    [['mlp.up'], ['q_proj'], ['mlp.up', 'q_proj']]
    """
    excluded = excluded_names(module, exclude_modules)
    found: dict[str, nn.Module] = {}
    for entry in [target_modules] if isinstance(target_modules, str) else target_modules:
        found |= _matches(module, entry, not isinstance(target_modules, str))
    return {n: m for n, m in found.items() if n not in excluded and not isinstance(m, LoRALinear)}


def select_layers(module: nn.Module, config: LoRAConfig, kept: Collection[nn.Module] = ()) -> Selection:
    """Decide which layers get adapters.

    Layers that the user has frozen while other parameters train serve another purpose (a teacher, a reward model, a
    perceptual loss). They get no adapters unless a name or regular expression matches frozen layers only. If everything
    is frozen, this rule does not apply.

    Args:
        module: Any module.
        config: The configuration of the adapters.
        kept: Modules that train in full.

    Returns:
        The selected layers, and those left out.

    Raises:
        TargetNotFoundError: If a name matches no linear layer, or nothing is left.
        ValueError: If a layer selected by name cannot have an adapter of this rank.
    """
    part, targets = find_part(module, config.module), config.target_modules
    excluded = excluded_names(part, config.exclude_modules)
    prefix = f"{config.module}." if config.module else ""
    owners, training = parameter_owners(module), anything_trains(part, kept)
    selection = Selection()
    for entry, named, matches in _entries(part, config):
        matches = {n: m for n, m in matches.items() if n not in excluded and holder(m) not in kept}
        frozen = {n for n, m in matches.items() if n != entry and frozen_by_user(m)}
        skip_frozen = training and ((entry == ALL_LINEAR and not named) or len(frozen) < len(matches))
        for name_in_part, layer in matches.items():
            name = prefix + name_in_part
            r = config.rank(name)
            reason = FROZEN if skip_frozen and name_in_part in frozen else misfit(layer, r, owners)
            if reason == TOO_SMALL and named and find_start(config.init).any_rank:
                reason = None  # LoRA needs no singular triplets, and PEFT allows any rank
            if reason is None:
                selection.layers[name] = layer
            elif named and reason != FROZEN:
                raise InvalidInputError(refusal(name, layer, r, reason))
            else:
                selection.left_out[name] = reason
    if not selection.layers:
        raise TargetNotFoundError(nothing_left(module, config, selection.left_out))
    for name in selection.layers.keys() & selection.left_out.keys():
        del selection.left_out[name]  # selected by another entry
    if targets == ALL_LINEAR:
        computed = (prefix + name for name in without_weight(part, kept) if name not in excluded)
        selection.left_out.update(dict.fromkeys(computed, "computes its weight (weight_norm?)"))
    return selection


def _entries(part: nn.Module, config: LoRAConfig) -> Iterator[tuple[str, bool, dict[str, nn.Module]]]:
    """Yield each entry of the targets, whether it names layers explicitly, and the layers it matches."""
    targets = config.target_modules
    named = not isinstance(targets, str)
    for entry in [targets] if isinstance(targets, str) else targets:
        yield entry, named, _matches(part, entry, named)
    for entry in config.target_parameters:
        yield entry, True, holding_parameters(part, entry)


def _matches(module: nn.Module, entry: str, is_name: bool) -> dict[str, nn.Module]:
    """Find the layers that one entry of ``target_modules`` matches; an adapted layer appears as its LoRALinear."""
    layers = adaptable_layers(module)
    if is_name:
        found, what = called(layers, unwrapped_name(entry)), f"target_modules entry {entry!r}"
    elif entry == ALL_LINEAR:
        found, what = all_linear(module, layers), f'target_modules="{ALL_LINEAR}"'
    else:
        found, what = matching(layers, entry), f"regular expression target_modules={entry!r}"
    if not found:
        raise TargetNotFoundError(no_match(module, what, layers, entry if is_name else None))
    return found
