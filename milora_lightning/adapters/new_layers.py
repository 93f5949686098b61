"""Detection of layers newly created for a task, by name or values, and the modules that train in full."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from milora_lightning.adapters.candidates import adaptable_layers, output_heads
from milora_lightning.adapters.freezing import frozen_by_user
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_embedding, is_linear, is_plain
from milora_lightning.adapters.parts import ends_with, find_modules, modules_by_name
from milora_lightning.config import AUTO, LoRAConfig
from milora_lightning.parallel.dtensor import is_sharded
from milora_lightning.utils.compat.torch import ConvNd

HEADS = {"head", "heads", "classifier", "classification_head", "cls_head", "fc", "score", "out_proj", "out", "output"}
HEADS |= {"output_layer", "qa_outputs", "regressor", "regression_head", "prediction_head", "value_head", "v_head"}
"""Usual names of task heads."""

ALSO_PRETRAINED = {"out_proj", "out", "output"}
"""Names among these that pretrained layers may have, too."""

FOUND = "_trains_in_full"
"""Attribute of a part with the names of the modules that ``modules_to_save="auto"`` has found in it."""


def saved_names(part: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the names of the modules that train in full: the configuration's or, with ``"auto"``, those that look new.

    The result is remembered, because weights no longer look new once training has changed them.

    Args:
        part: The module, or the part of it that is adapted.
        config: The configuration of the adapters.

    >>> saved_names(nn.ModuleDict({"head": nn.Linear(8, 3)}), LoRAConfig(modules_to_save="auto"))
    ['head']
    """
    if config.modules_to_save != AUTO:
        return list(config.modules_to_save)
    found = dict.fromkeys(getattr(part, FOUND, ()))
    found |= dict.fromkeys(name for name in _new_modules(part) if not _is_in(name, found))
    setattr(part, FOUND, tuple(found))
    return list(found)


def saved_modules(part: nn.Module, config: LoRAConfig) -> list[nn.Module]:
    """Return the modules that train in full.

    Args:
        part: The module, or the part of it that is adapted.
        config: The configuration of the adapters.
    """
    names = saved_names(part, config)
    if config.modules_to_save != AUTO:
        return find_modules(part, names)
    modules = modules_by_name(part)
    return [modules[name] for name in names]


def _new_modules(part: nn.Module) -> Iterator[str]:
    """Yield the names of layers, or of modules around them, that look new or are named like a classifier, in order."""
    heads = output_heads(part)
    named = ((n, getattr(m, "base_layer", m)) for n, m in adaptable_layers(part).items())
    layers = [layer for name, layer in named if not (named_as_head(name) or is_embedding(layer))]
    pretrained = not all(looks_new(layer) for layer in layers[:: max(1, len(layers) // 8)])
    owned = (LoRALinear, nn.MultiheadAttention)
    inside = {child for owner in part.modules() if isinstance(owner, owned) for child in owner.modules()}
    modules = modules_by_name(part)
    found: dict[str, None] = {}
    for name, child in modules.items():
        if not name or not (is_linear(child) or isinstance(child, ConvNd)) or child in inside or child in heads:
            continue
        if ends_with(name, "lm_head") or frozen_by_user(child) or _is_in(name, found):
            continue
        new = pretrained and isinstance(child, nn.Linear) and looks_new(child)
        head = named_as_head(name)
        if head and (new or head.rpartition(".")[2] not in ALSO_PRETRAINED):
            found[head if inside.isdisjoint(modules[head].modules()) else name] = None
        elif new:
            found[name] = None
    yield from found


def _is_in(name: str, found: dict[str, None]) -> bool:
    return any(name == outer or name.startswith(f"{outer}.") for outer in found)


def named_as_head(name: str) -> str:
    """Return a layer's name up to a usual name of heads before any number (of a list of layers), or an empty string.

    >>> named_as_head("model.classifier.dense"), named_as_head("encoder.layer.0.output.dense")
    ('model.classifier', '')
    """
    parts = name.split(".")
    for end, part in enumerate(parts, 1):
        if part.isdigit():
            return ""
        if part in HEADS:
            return ".".join(parts[:end])
    return ""


def looks_new(layer: nn.Module) -> bool:
    """Whether a weight's entries are uniformly distributed, as torch's initializers draw them, or constant.

    Then the largest absolute value is √3 times the root mean square; in trained weights it is several times larger.
    """
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or is_sharded(layer) or not is_plain(weight):
        return False
    sample = weight.detach().flatten()[:4096].float()
    size = sample.square().mean().sqrt().item()
    return sample.numel() >= 64 and sample.abs().max().item() <= 1.03 * math.sqrt(3) * size
