"""Formulas for what a decoder layer with adapters saves for backward: activations and stacked factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from milora_lightning.adapters.candidates import base_of
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.linear_layers import linear_shape, matrices_in
from milora_lightning.utils.names import unwrapped_name

INTERMEDIATE = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")
"""Names of the MLP's intermediate size in different architectures."""


ROUTED = "num_experts_per_tok"
SAVED_BY_EXPERTS = {"GptOssExperts": 6}
"""Numbers saved per intermediate feature by experts whose activation is more than a gate: clamped, and shifted."""


def active_intermediate(size: Any) -> int:
    """Return the number of intermediate features that a token passes through, over all experts that it is routed to."""
    per_expert = getattr(size, "moe_intermediate_size", None) if getattr(size, ROUTED, None) else None
    return _routed(size) * int(per_expert or _intermediate(size))


def _routed(size: Any) -> int:
    return int(getattr(size, ROUTED, None) or 1)


def _intermediate(size: Any) -> int:
    """Return the number of intermediate features of the MLP, whatever its name in the architecture.

    If a configuration does not specify it (GPT-2, BLOOM), it is four times the hidden size.
    """
    named = [getattr(size, name, None) for name in INTERMEDIATE]
    found = [max(value) if isinstance(value, (list, tuple)) else value for value in named if value]
    return int(found[0]) if found else 4 * int(size.hidden_size)


def saved_by_layer(
    layer: nn.Module, config: PretrainedConfig, width: int, length: int, masks: bool, attention: str
) -> int:
    """Return the bytes per token that a decoder layer saves for backward.

    Args:
        layer: The layer, with its adapters.
        config: The model's configuration.
        width: Bytes per number in the dtype that the model computes in.
        length: Length of the sequences in tokens.
        masks: Whether dropout masks are stored.
        attention: Name of the attention implementation.
    """
    size = config.get_text_config()
    heads = size.num_attention_heads
    groups = getattr(size, "num_key_value_heads", None) or heads
    head_dim = getattr(size, "head_dim", None) or size.hidden_size // heads
    saved = 0
    for name, module in layer.named_modules():
        # Norms compute in float32 and save their input in it; norms of queries and keys have an input for each head.
        if "Norm" in type(module).__name__:
            scales = getattr(module, "weight", None)
            features = size.hidden_size if scales is None else scales.numel()
            by_head = {"q_norm": heads, "k_norm": groups}.get(name.rpartition(".")[2], 1)
            saved += 4 * features * (by_head if features == head_dim else 1)
    # Queries, keys and values, the latter two repeated for every head by implementations that do not support groups;
    # the output, or what it takes to recompute it; attention weights where they are materialized.
    if attention == "eager":
        # With sinks, the softmax is computed in the model's dtype; otherwise in float32, and converted.
        by_pair = width if hasattr(getattr(layer, "self_attn", None), "sinks") else 4 + (width if width < 4 else 0)
        saved += 3 * heads * head_dim * width + heads * length * by_pair
    elif attention == "causal_blocks":
        saved += (heads + 2 * groups) * head_dim * width + heads * (length + 64) // 2 * width
    else:
        saved += 2 * (heads + groups) * head_dim * width + 4 * heads
    saved += _saved_by_mlp(layer, size) * width
    # The output of attention, and the gated MLP's product, which is recomputed from its factors.
    already_saved = ("down_proj",) if attention in ("eager", "causal_blocks") else ("o_proj", "down_proj")
    adapters = sum(_saved_by_adapters(layer, width, masks, already_saved, _routed(size)))
    return int(saved) + adapters + sum(_saved_by_trained(layer, width, already_saved))


def _saved_by_mlp(layer: nn.Module, size: Any) -> int:
    """Return how many numbers per token a gated MLP saves: both products and the activation.

    A mixture of experts saves them for each expert that a token is routed to, and for shared experts, which see every
    token; besides, the outputs that are multiplied by a weight, a router's or a gate's.
    """
    modules = {unwrapped_name(name): base_of(module) for name, module in layer.named_modules()}
    classes = {name: type(module).__name__ for name, module in modules.items()}
    kinds = {kind for name, kind in classes.items() if name.endswith("experts") or "Experts" in kind}
    if not kinds:
        return 3 * _intermediate(size)
    each = max(SAVED_BY_EXPERTS.get(kind, 3) for kind in kinds)
    shared = [base for name, base in modules.items() if name.endswith("down_proj") and isinstance(base, nn.Linear)]
    weighted = _routed(size) + any(name.endswith("shared_expert_gate") for name in modules)
    features = each * active_intermediate(size) + 3 * sum(base.in_features for base in shared)
    return features + weighted * int(size.hidden_size)


def _saved_by_trained(layer: nn.Module, width: int, already_saved: tuple[str, ...]) -> Iterable[int]:
    """Yield the bytes per token of inputs saved by fully trained layers; an input shared by several counts once."""
    inputs: set[tuple[str, int]] = set()
    for name, module in layer.named_modules():
        parent, _, last = name.rpartition(".")
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
            continue
        if "Norm" in type(module).__name__:  # the normalized input, which is multiplied by the scale
            yield width * weight.numel()
        elif isinstance(module, nn.Linear) and last == "o_proj":
            yield 0 if last in already_saved else width * module.in_features
        elif isinstance(module, nn.Linear) and (parent, module.in_features) not in inputs:
            inputs.add((parent, module.in_features))
            yield width * module.in_features


def _saved_by_adapters(
    layer: nn.Module, width: int, masks: bool, already_saved: tuple[str, ...], routed: int
) -> Iterable[int]:
    """Yield the bytes per token that adapters save: the input (once if several share it), projection and mask.

    For each token, all experts that it is routed to save this.
    """
    inputs: set[tuple[str, int]] = set()
    for name, module in lora_layers(layer).items():
        of_experts = matrices_in(module) is not None
        times = routed if of_experts else 1
        features = times * linear_shape(module.base_layer)[1]
        parent, _, last = name.rpartition(".")
        source = name if last == "o_proj" else parent  # as wide as the queries' input, but another
        if (source, features) not in inputs and (of_experts or last not in already_saved):
            inputs.add((source, features))
            yield width * features
        yield width * times * module.update_rank
        if masks:
            yield features


def stacked_factors(layer: nn.Module, width: int) -> int:
    """Return the bytes of the stacked factors that the adapters of a layer save in its dtype."""
    adapters = lora_layers(layer).values()
    cast = [m for m in adapters if m.initial_A is not None or width != m.lora_A.itemsize]
    return sum(width * m.update_rank * sum(linear_shape(m.base_layer)) * (matrices_in(m) or 1) for m in cast)
