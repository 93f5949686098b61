"""Which layers of a model get adapters, and which are left out for what reason."""

from __future__ import annotations

import difflib
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from milora_lightning.adapters.layer import PLAIN_LAYERS, LoRALinear, linear_shape
from milora_lightning.adapters.linear_layers import is_linear
from milora_lightning.adapters.parts import (
    TargetNotFoundError,
    ends_with,
    excluded_names,
    find_part,
    modules_by_name,
    some,
)
from milora_lightning.adapters.quantization import PLAIN_TENSORS, is_plain
from milora_lightning.config import ALL_LINEAR, LoRAConfig
from milora_lightning.utils.compat import is_traceable_wrapper_subclass
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import unwrapped_name

TOO_SMALL = "is too small for r"
FROZEN = "was frozen by you"
TRAINED_BEFORE = "_trained_before_surgery"
"""Attribute of modules whose own parameters trained until surgery froze them."""


@dataclass(frozen=True)
class Selection:
    """What a configuration means in a model.

    Attributes:
        layers: The layers that get adapters, or have them, by name.
        left_out: Layers that ``target_modules`` describes and that get none, by name, with the reason.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def find_targets(
    module: nn.Module, target_modules: str | Sequence[str], exclude_modules: str | Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Find the linear layers that are described and have no adapter yet, whether or not an adapter fits them.

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


def select_layers(module: nn.Module, config: LoRAConfig, kept: Collection[nn.Module] = ()) -> Selection:
    """Decide which layers get adapters.

    What the user has frozen while other parameters train is there for another purpose (a teacher, a reward model, a
    perceptual loss). So ``"all-linear"`` does not mean it, and neither does a name or regular expression that matches
    layers that train as well; one that matches frozen layers only does. Where nothing trains, freezing says nothing.

    Args:
        module: Any module.
        config: What is asked for.
        kept: Modules that train in full.

    Returns:
        The layers, and what is left out.

    Raises:
        TargetNotFoundError: If a name matches no linear layer, or nothing is left.
        ValueError: If a layer that was named itself cannot have an adapter of this rank.
    """
    part, targets = find_part(module, config.module), config.target_modules
    named = not isinstance(targets, str)
    excluded = excluded_names(part, config.exclude_modules)
    prefix = f"{config.module}." if config.module else ""
    users, training = _users(module), _anything_trains(part, kept)
    selection = Selection()
    for entry in targets if named else [targets]:
        matches = _matches(part, str(entry), named)
        matches = {n: m for n, m in matches.items() if n not in excluded and m not in kept}
        frozen = {n for n, m in matches.items() if n != entry and frozen_by_user(m)}
        respected = training and (targets == ALL_LINEAR or len(frozen) < len(matches))
        for relative, layer in matches.items():
            name = prefix + relative
            reason = FROZEN if respected and relative in frozen else _misfit(layer, config.rank(name), users)
            if reason == TOO_SMALL and named and config.init == "lora":
                reason = None  # no singular triplets are needed, and an adapter of PEFT's may have any rank
            if reason is None:
                selection.layers[name] = layer
            elif named and reason != FROZEN:
                raise InvalidInputError(_refusal(name, layer, config.rank(name), reason))
            else:
                selection.left_out[name] = reason
    if not selection.layers:
        raise TargetNotFoundError(_nothing_left(module, config, selection.left_out))
    for name in selection.layers.keys() & selection.left_out.keys():
        del selection.left_out[name]
    if targets == ALL_LINEAR:
        computed = (name for name in _computed(part, kept) if name not in excluded)
        selection.left_out.update({prefix + name: "computes its weight (weight_norm?)" for name in computed})
    return selection


def frozen_by_user(layer: nn.Module) -> bool:
    """Whether somebody else than this package has frozen all of a layer's own parameters.

    Quantized weights, which cannot train, say nothing.
    """
    if isinstance(layer, LoRALinear) or getattr(layer, TRAINED_BEFORE, False):
        return False
    own = [p for p in layer._parameters.values() if p is not None]
    can_train = [p for p in own if p.is_floating_point() and p.dtype.itemsize > 1]
    return bool(own) and len(can_train) == len(own) and not any(p.requires_grad for p in own)


def _anything_trains(module: nn.Module, kept: Collection[nn.Module]) -> bool:
    """Whether a module had parameters that train before surgery, apart from those that are to train in full."""
    others = (m for m in module.modules() if m not in kept and not isinstance(m, LoRALinear))
    return any(
        getattr(m, TRAINED_BEFORE, False) or any(p is not None and p.requires_grad for p in m._parameters.values())
        for m in others
    )


def _matches(module: nn.Module, entry: str, is_name: bool) -> dict[str, nn.Module]:
    """The layers that one entry of ``target_modules`` describes, those with adapters as their LoRALinear."""
    layers = adaptable_layers(module)
    if is_name:
        found = {name: layer for name, layer in layers.items() if ends_with(name, unwrapped_name(entry))}
        what = f"target_modules entry {entry!r}"
    elif entry == ALL_LINEAR:
        heads = output_heads(module)
        found = {n: m for n, m in layers.items() if _base(m) not in heads and not ends_with(n, "lm_head")}
        what = f'target_modules="{ALL_LINEAR}"'
    else:
        found = {name: layer for name, layer in layers.items() if re.fullmatch(entry, name)}
        what = f"regular expression target_modules={entry!r}"
    if not found:
        raise TargetNotFoundError(_no_match(module, what, layers, entry if is_name else None))
    return found


def adaptable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return all linear layers that have a weight by name, those with adapters as their LoRALinear."""
    bases = {child.base_layer for child in module.modules() if isinstance(child, LoRALinear)}
    layers: dict[str, nn.Module] = {}
    for wrapped_name, child in module.named_modules():
        name = unwrapped_name(wrapped_name)
        linear = name and is_linear(child) and child not in bases
        if isinstance(child, LoRALinear) or (linear and child._parameters.get("weight") is not None):
            layers[name] = child
    return layers


def _computed(module: nn.Module, kept: Collection[nn.Module]) -> list[str]:
    layers = ((n, m) for n, m in module.named_modules() if is_linear(m) and m not in kept)
    return [unwrapped_name(name) for name, layer in layers if name and layer._parameters.get("weight") is None]


def output_heads(module: nn.Module) -> set[nn.Module | None]:
    """Return the output embeddings of all language models within a module."""
    transformers = sys.modules.get("transformers.modeling_utils")  # imported by whoever has made such a model
    if transformers is None:
        return set()
    models = (m for m in module.modules() if isinstance(m, transformers.PreTrainedModel))
    return {_base(head) for m in models if isinstance(head := m.get_output_embeddings(), nn.Module)}


def _base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LoRALinear) else layer


Users = dict[tuple[object, ...], list[tuple[nn.Module, str]]]
"""The modules that have a parameter in a piece of memory, with the parameter's full name."""


def _users(module: nn.Module) -> Users:
    users: Users = defaultdict(list)
    for name, child in module.named_modules():
        for key, parameter in child._parameters.items():
            if parameter is not None:
                users[_storage(parameter)].append((child, unwrapped_name(f"{name}.{key}".lstrip("."))))
    return users


def _storage(parameter: Tensor) -> tuple[object, ...]:
    """What two parameters have in common if and only if they are one memory (or one object, without memory)."""
    if parameter.is_meta or parameter.numel() == 0 or is_traceable_wrapper_subclass(parameter):
        return ("object", id(parameter))
    if parameter.data_ptr() == 0:
        return ("object", id(parameter))
    return (parameter.device, parameter.data_ptr())


def _misfit(layer: nn.Module, r: int, users: Users) -> str | None:
    """Why a layer cannot have an adapter of rank r; None if it can, or has one."""
    if isinstance(layer, LoRALinear):
        return None
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    if weight.is_complex():
        return "has complex weights"
    if type(layer) in PLAIN_LAYERS and type(weight) in PLAIN_TENSORS and not is_plain(weight):
        return f"has weights of {weight.dtype}"
    if r > min(linear_shape(layer)):
        return TOO_SMALL
    others = sorted(name for user, name in users[_storage(weight)] if user is not layer)
    return f"is tied to {', '.join(others)}" if others else None


def _refusal(name: str, layer: nn.Module, r: int, reason: str) -> str:
    if reason == TOO_SMALL:
        most = min(linear_shape(layer))
        return f"{too_large(name, layer, r)} Choose r of at most {most}, or leave the layer out of target_modules."
    if reason.startswith("is tied to"):
        return (
            f"The weight of target {name!r} {reason}: an adapter would change one and not the other. Leave it out of "
            "target_modules, or untie the weights."
        )
    return f"Target {name!r} {reason}, for which there are no adapters. Leave it out of target_modules."


def too_large(name: str, layer: nn.Module, r: int) -> str:
    """Say that a rank exceeds the size of a layer."""
    out_features, in_features = linear_shape(layer)
    return f"r={r} is larger than layer {name!r} allows, whose weight is {out_features}×{in_features}."


def _nothing_left(module: nn.Module, config: LoRAConfig, left_out: dict[str, str]) -> str:
    """Say why no layer gets an adapter."""
    if not left_out:
        if config.exclude_modules:
            return "All of target_modules is inside modules_to_save and exclude_modules: nothing is left to adapt."
        return "All of target_modules is inside modules_to_save: nothing is left to adapt."
    small = [name for name, reason in left_out.items() if reason == TOO_SMALL]
    layers = modules_by_name(module)
    largest = max((min(linear_shape(layers[name])) for name in small), default=0)
    parts = [too_large(small[0], layers[small[0]], config.rank(small[0]))] if small else []
    parts += [
        f"{some([n for n, why in left_out.items() if why == r])} {r}."
        for r in sorted({*left_out.values()} - {TOO_SMALL})
    ]
    remedies = [f"choose r of at most {largest}"] if largest else []
    if FROZEN in left_out.values():
        remedies.append("name what is to be adapted in target_modules, or freeze it after surgery, not before")
    remedies.append("name layers in modules_to_save to train them in full")
    what = f"target_modules={config.target_modules!r}"
    return f"No layer is left for adapters with {what}: {' '.join(parts)} {', or '.join(remedies).capitalize()}."


def _no_match(module: nn.Module, what: str, layers: dict[str, nn.Module], target: str | None = None) -> str:
    others = {type(m).__name__ for n, m in modules_by_name(module).items() if target and ends_with(n, target)}
    if others:
        return (
            f"The {what} matches only modules of type {', '.join(sorted(others))}; adapters fit nn.Linear and Conv1D. "
            "Name linear layers instead."
        )
    endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
    close = difflib.get_close_matches(target or "", endings, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    exists = f"Its linear layers end in: {', '.join(endings)}." if endings else "It has no linear layers at all."
    return f"The {what} matches no linear layer of {type(module).__name__}. {exists}{hint}"
