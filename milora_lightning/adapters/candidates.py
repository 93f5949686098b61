"""The layers of a model that can have adapters, and those that names, expressions and ``"all-linear"`` select."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from milora_lightning.adapters.experts import is_of_experts, is_stack, routers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_adaptable, is_embedding, is_linear
from milora_lightning.adapters.packed import is_packed
from milora_lightning.adapters.parts import TargetNotFoundError, ends_with, first_few, held_weights
from milora_lightning.adapters.target_errors import no_match, no_parameter
from milora_lightning.utils.names import unwrapped_name

Layers = dict[str, nn.Module]
"""Layers by name; an adapted layer appears as its LoRALinear."""


def adaptable_layers(module: nn.Module) -> Layers:
    """Return all layers of a module that can have adapters."""
    bases = {child.base_layer for child in module.modules() if isinstance(child, LoRALinear)}
    layers: Layers = {}
    for wrapped_name, child in module.named_modules():
        name = unwrapped_name(wrapped_name)
        fitting = name and is_adaptable(child) and child not in bases
        if isinstance(child, LoRALinear) or (fitting and child._parameters.get("weight") is not None):
            layers[name] = child
    return layers | held_weights(module)


def called(layers: Mapping[str, nn.Module], name: str) -> Layers:
    """Return the layers with this name or name ending. Stacks of experts must be named in full."""
    return {n: layer for n, layer in layers.items() if n == name or (ends_with(n, name) and not _is_stack(layer))}


def matching(layers: Mapping[str, nn.Module], expression: str) -> Layers:
    """Return the layers whose full names a regular expression matches; embeddings only if it matches nothing else."""
    found = {n: layer for n, layer in layers.items() if re.fullmatch(expression, n) and not _is_stack(layer)}
    return {n: layer for n, layer in found.items() if not is_embedding(base_of(layer))} or found


def all_linear(module: nn.Module, layers: Mapping[str, nn.Module]) -> Layers:
    """Return the linear layers and experts of a module, without language-model heads and routers."""
    heads = output_heads(module)
    linear = {n: m for n, m in layers.items() if is_linear(base_of(m)) or is_packed(base_of(m))}
    linear = {n: m for n, m in linear.items() if base_of(m) not in heads and not ends_with(n, "lm_head")}
    experts = {n: m for n, m in layers.items() if is_stack(stack := base_of(m)) and is_of_experts(n, stack)}
    deciding = routers(linear, experts)
    return {n: m for n, m in linear.items() if n not in deciding} | experts


def layers_named(module: nn.Module, names: Sequence[str]) -> Layers:
    """Return the layers with these full names.

    Args:
        module: Any module.
        names: Full names of layers.


    Raises:
        TargetNotFoundError: If one of them does not name a layer that can have an adapter.
    """
    layers, names = adaptable_layers(module), [unwrapped_name(name) for name in names]
    missing = [name for name in names if name not in layers]
    if missing:
        absent = [name for name in missing if not called(layers, name)]
        if absent:
            raise TargetNotFoundError(no_match(module, f"target_modules entry {absent[0]!r}", layers, absent[0]))
        raise TargetNotFoundError(f"{type(module).__name__} has no linear layer {first_few(missing)}.")
    return {name: layers[name] for name in names}


def holding_parameters(module: nn.Module, entry: str) -> Layers:
    """Return the stacks, or the layers of the weights, that an entry of ``target_parameters`` names."""
    layers = adaptable_layers(module)
    found = {n: layer for n, layer in layers.items() if ends_with(_parameter_name(n, layer), entry)}
    if not found:
        raise TargetNotFoundError(no_parameter(module, entry, [n for n, layer in layers.items() if _is_stack(layer)]))
    return found


def without_weight(module: nn.Module, kept: Collection[nn.Module]) -> list[str]:
    """Return the names of linear layers whose weight is not a parameter but computed from others (``weight_norm``)."""
    layers = ((n, m) for n, m in module.named_modules() if is_linear(m) and m not in kept)
    return [unwrapped_name(name) for name, layer in layers if name and layer._parameters.get("weight") is None]


def output_heads(module: nn.Module) -> set[nn.Module | None]:
    """Return the output embeddings of all language models within a module."""
    transformers = sys.modules.get("transformers.modeling_utils")  # if it is not imported, there is no such model
    if transformers is None:
        return set()
    models = (m for m in module.modules() if isinstance(m, transformers.PreTrainedModel))
    return {base_of(head) for m in models if isinstance(head := m.get_output_embeddings(), nn.Module)}


def _parameter_name(name: str, layer: nn.Module) -> str:
    if _is_stack(layer):
        return name
    return f"{name}_weight" if is_packed(base_of(layer)) else f"{name}.weight"


def _is_stack(layer: nn.Module) -> bool:
    return is_stack(base_of(layer))


def base_of(layer: nn.Module) -> nn.Module:
    """Return an adapter's base layer, or the layer itself if it is no adapter."""
    return layer.base_layer if isinstance(layer, LoRALinear) else layer
