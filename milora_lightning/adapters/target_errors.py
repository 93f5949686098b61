"""Error messages about target layers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from milora_lightning.adapters.linear_layers import groups_of, is_convolution, is_linear, largest_rank, linear_shape
from milora_lightning.adapters.parts import ends_with, first_few, layers_by_name, modules_by_name
from milora_lightning.config import LoRAConfig

TOO_SMALL = "is too small for r"
UNEVEN = "has more groups than r, or a number of them that does not divide it,"
FROZEN = "was frozen by you"


def refusal(name: str, layer: nn.Module, r: int, reason: str) -> str:
    """Return a message: why a layer selected by name cannot have an adapter.

    Args:
        name: The layer's name.
        layer: The layer.
        r: Requested rank of its adapter.
        reason: The result of :func:`milora_lightning.adapters.misfits.misfit`.
    """
    if reason == TOO_SMALL:
        most = largest_rank(layer)
        return f"{_too_large(name, layer, r)} Choose r of at most {most}, or leave the layer out of target_modules."
    if reason == UNEVEN:
        groups = groups_of(layer)
        return (
            f"r={r} cannot be shared among the {groups} groups of the convolution {name!r}: give it a multiple of "
            f"{groups} in rank_pattern, of at most {largest_rank(layer)}, or leave it out (exclude_modules)."
        )
    if reason.startswith("is tied to"):
        return (
            f"The weight of target {name!r} {reason}: an adapter would change one and not the other. Leave it out of "
            "target_modules, or untie the weights."
        )
    return f"Target {name!r} {reason}, for which there are no adapters. Leave it out of target_modules."


def _too_large(name: str, layer: nn.Module, r: int) -> str:
    out_features, in_features = linear_shape(layer)
    return f"r={r} is larger than layer {name!r} allows, whose weight is {out_features}×{in_features}."


def nothing_left(module: nn.Module, config: LoRAConfig, left_out: Mapping[str, str]) -> str:
    """Return a message: why no layer gets an adapter.

    Args:
        module: The module.
        config: The configuration of the adapters.
        left_out: The reason for each layer that gets no adapter, by name.
    """
    if not left_out:
        if config.exclude_modules:
            return "All of target_modules is inside modules_to_save and exclude_modules: nothing is left to adapt."
        return "All of target_modules is inside modules_to_save: nothing is left to adapt."
    small = [name for name, reason in left_out.items() if reason == TOO_SMALL]
    layers = layers_by_name(module)
    largest = max((largest_rank(layers[name]) for name in small), default=0)
    parts = [_too_large(small[0], layers[small[0]], config.rank(small[0]))] if small else []
    parts += [
        f"{first_few([n for n, why in left_out.items() if why == r])} {r}."
        for r in sorted({*left_out.values()} - {TOO_SMALL})
    ]
    remedies = [f"choose r of at most {largest}"] if largest else []
    if FROZEN in left_out.values():
        remedies.append("name what is to be adapted in target_modules, or freeze it after surgery, not before")
    remedies.append("name layers in modules_to_save to train them in full")
    what = f"target_modules={config.target_modules!r}"
    return f"No layer is left for adapters with {what}: {' '.join(parts)} {', or '.join(remedies).capitalize()}."


def no_match(module: nn.Module, what: str, layers: Mapping[str, nn.Module], target: str | None = None) -> str:
    """Return a message: an entry of ``target_modules`` matches no linear layer, and these layers exist.

    Args:
        module: The module that was searched.
        what: How the message refers to the entry.
        layers: The layers that can have adapters, by name.
        target: The entry if it is a name, to suggest a similar one.
    """
    others = {type(m).__name__ for n, m in modules_by_name(module).items() if target and ends_with(n, target)}
    if others:
        return (
            f"The {what} matches only modules of type {', '.join(sorted(others))}; adapters fit linear layers "
            "(nn.Linear, Conv1D), convolutions (nn.Conv1d, nn.Conv2d, nn.Conv3d), nn.Embedding, and in_proj and "
            "out_proj of nn.MultiheadAttention: name such layers."
        )
    every = sorted({name.rsplit(".", 1)[-1] for name in layers})
    endings = sorted({name.rsplit(".", 1)[-1] for name, layer in layers.items() if is_linear(layer)})
    close = difflib.get_close_matches(target or "", every, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    exists = f"Its linear layers end in: {', '.join(endings)}." if endings else "It has no linear layers at all."
    if convolutions := sorted({name.rsplit(".", 1)[-1] for name, layer in layers.items() if is_convolution(layer)}):
        exists += f" Convolutions get adapters if named: {', '.join(convolutions)}."
    return f"The {what} matches no linear layer of {type(module).__name__}. {exists}{hint}"


def no_parameter(module: nn.Module, target: str, stacks: Sequence[str]) -> str:
    """Return a message: an entry of ``target_parameters`` names no stack of matrices, and these exist."""
    what = f"The target_parameters entry {target!r}"
    endings = sorted({".".join(name.split(".")[-2:]) for name in stacks})
    exists = f"There are: {', '.join(endings)}." if endings else "There are none."
    return f"{what} names none of {type(module).__name__}'s 3-D parameters, which hold a stack of matrices. {exists}"
