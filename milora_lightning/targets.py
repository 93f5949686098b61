"""Which layers of a model get adapters."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from milora_lightning.lora import LoRALinear
from milora_lightning.names import WRAPPERS, unwrapped_name

ALL_LINEAR = "all-linear"


class TargetNotFoundError(ValueError):
    """Something in ``target_modules`` or ``modules_to_save`` matches nothing in the model."""


def find_targets(module: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """Find the linear layers that are to get an adapter and have none yet.

    A layer that is registered under several names counts under its first.

    Args:
        module: Any module.
        target_modules: As in :class:`LoRAConfig`.

    Returns:
        The layers by name; empty only if all targets have adapters already.

    Raises:
        TargetNotFoundError: If something in ``target_modules`` matches no linear layer; lists what there is.

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "mlp": nn.ModuleDict({"up": nn.Linear(2, 2)})})
    >>> [sorted(find_targets(model, targets)) for targets in (["up"], r"q_.*", "all-linear")]
    [['mlp.up'], ['q_proj'], ['mlp.up', 'q_proj']]
    """
    layers = _adaptable_layers(module)
    if target_modules == ALL_LINEAR:
        heads = _heads(module)
        found = {n: m for n, m in layers.items() if _base(m) not in heads and not _ends_with(n, "lm_head")}
        if not found:
            raise TargetNotFoundError(_no_match(module, f'target_modules="{ALL_LINEAR}"', layers))
    elif isinstance(target_modules, str):
        found = {name: layer for name, layer in layers.items() if re.fullmatch(target_modules, name)}
        if not found:
            raise TargetNotFoundError(
                _no_match(module, f"regular expression target_modules={target_modules!r}", layers)
            )
    else:
        found = {}
        for target in target_modules:
            plain = unwrapped_name(target)
            matches = {name: layer for name, layer in layers.items() if _ends_with(name, plain)}
            if not matches:
                raise TargetNotFoundError(_no_match(module, f"target_modules entry {target!r}", layers, target))
            found |= matches
    return {name: layer for name, layer in found.items() if not isinstance(layer, LoRALinear)}


def _adaptable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """All linear layers by name, those with adapters as their LoRALinear."""
    bases = {child.base_layer for child in module.modules() if isinstance(child, LoRALinear)}
    layers: dict[str, nn.Module] = {}
    for wrapped_name, child in module.named_modules():
        name = unwrapped_name(wrapped_name)
        if isinstance(child, LoRALinear):
            layers[name] = child
        elif name and isinstance(child, (nn.Linear, Conv1D)) and child not in bases:
            if child._parameters.get("weight") is None:
                warnings.warn(f"Layer {name!r} computes its weight (weight_norm?) and gets no adapter.", stacklevel=2)
            else:
                layers[name] = child
    return layers


def _heads(module: nn.Module) -> set[nn.Module | None]:
    """The output embeddings of all language models within a module."""
    models = (m for m in module.modules() if isinstance(m, PreTrainedModel))
    return {_base(head) for m in models if isinstance(head := m.get_output_embeddings(), nn.Module)}


def _base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LoRALinear) else layer


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _no_match(module: nn.Module, what: str, layers: dict[str, nn.Module], target: str | None = None) -> str:
    others = {type(m).__name__ for n, m in module.named_modules() if target and _ends_with(n, target)}
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


def find_modules(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Find all modules whose name ends in one of ``names``.

    Raises:
        TargetNotFoundError: If a name matches nothing.
    """
    kept = []
    for wanted in names:
        matches = [
            child
            for name, child in module.named_modules()
            if _ends_with(unwrapped_name(name), unwrapped_name(wanted)) and name.rpartition(".")[2] not in WRAPPERS
        ]
        if not matches:
            raise TargetNotFoundError(
                f"modules_to_save names {wanted!r}, but {type(module).__name__} has no such module."
            )
        kept += matches
    return kept
