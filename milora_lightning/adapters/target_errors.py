"""Error messages about target layers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from torch import nn

from milora_lightning.adapters.linear_layers import linear_shape
from milora_lightning.adapters.parts import ends_with, first_few, modules_by_name
from milora_lightning.config import LoRAConfig

TOO_SMALL = "is too small for r"
FROZEN = "was frozen by you"


def refusal(name: str, layer: nn.Module, r: int, reason: str) -> str:
    """Say why a layer that was named cannot have an adapter."""
    if reason == TOO_SMALL:
        most = min(linear_shape(layer))
        return f"{_too_large(name, layer, r)} Choose r of at most {most}, or leave the layer out of target_modules."
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
    """Say why no layer gets an adapter."""
    if not left_out:
        if config.exclude_modules:
            return "All of target_modules is inside modules_to_save and exclude_modules: nothing is left to adapt."
        return "All of target_modules is inside modules_to_save: nothing is left to adapt."
    small = [name for name, reason in left_out.items() if reason == TOO_SMALL]
    layers = modules_by_name(module)
    largest = max((min(linear_shape(layers[name])) for name in small), default=0)
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
    """Say that an entry of ``target_modules`` matches no linear layer, and which layers exist."""
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
