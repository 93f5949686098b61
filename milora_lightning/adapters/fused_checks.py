"""Checks of ``fused_parts`` before surgery: which layers can have separate factors for their parts."""

from __future__ import annotations

from typing import Any

from torch import nn

from milora_lightning.adapters.held_weight import holder
from milora_lightning.adapters.linear_layers import is_linear, linear_shape, matrices_in
from milora_lightning.adapters.packed import is_packed
from milora_lightning.config import LoRAConfig
from milora_lightning.starts import find_start
from milora_lightning.utils.errors import InvalidInputError

INTERLEAVED = {
    "bloom": ("query_key_value",),
    "codegen": ("qkv_proj",),
    "falcon": ("query_key_value",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "gpt_neox_japanese": ("query_key_value",),
    "internlm2": ("wqkv",),
    "minimax": ("qkv_proj",),
    "persimmon": ("query_key_value",),
    "qwen3_next": ("in_proj_qkvz", "in_proj_ba"),
}
"""Layers whose rows alternate between query, key and value for each head, by model type in transformers."""


def check_parts(name: str, layer: nn.Module, config: LoRAConfig, module: nn.Module) -> None:
    """Refuse parts that do not fit a layer.

    Args:
        name: The layer's name.
        layer: The layer, without an adapter.
        config: The configuration of the adapters.
        module: The whole module, which is searched for configurations of transformers' models.

    Raises:
        ValueError: If the layer is not linear, its rows do not match the parts, or the rank exceeds a part's size.
    """
    out_features, in_features = linear_shape(layer)
    given, sizes = config.given_parts(name), config.parts(name, out_features)
    if given is None:
        return
    if not any(fits(layer) for fits in (is_linear, is_packed)):
        what = "holds a stack of matrices" if matrices_in(layer) else f"is of type {type(layer).__name__}"
        raise InvalidInputError(
            f"fused_parts means {name!r}, which {what} and is no linear layer: write its key so that it does not match."
        )
    shape = f"{out_features}×{in_features}"
    if sum(sizes) != out_features:
        wrong = f"cannot be split into {given} equal parts" if isinstance(given, int) else f"has not {sum(sizes)} rows"
        raise InvalidInputError(
            f"fused_parts={given} does not fit layer {name!r}, whose weight is {shape}: it {wrong}. Give the rows of "
            f"each part, {out_features} together."
        )
    kind = interleaved(holder(layer), name, module)
    if kind is not None:
        raise InvalidInputError(
            f"The rows of {name!r} are no parts below one another: models of type {kind!r} mix those of query, key and "
            "value, head by head. Leave its key out of fused_parts."
        )
    r, most = config.rank(name), min(*sizes, in_features)
    if r > most and not find_start(config.init).any_rank:
        raise InvalidInputError(
            f"r={r} is larger than the smallest part of layer {name!r} allows, which is {min(sizes)}×{in_features}: "
            f"choose r of at most {most}, for this layer by rank_pattern."
        )


def interleaved(owner: nn.Module, name: str, module: nn.Module) -> str | None:
    """Return the type of the model around a layer if it is known to interleave the rows of parts, otherwise None.

    Args:
        owner: The module that holds the layer's weight.
        name: The layer's name.
        module: The whole module.
    """
    ending = name.rpartition(".")[2]
    around = [m.config for m in module.modules() if hasattr(m, "config") and any(c is owner for c in m.modules())]
    configs: list[Any] = [c for c in around if hasattr(c, "model_type")]
    for config in configs[-1:]:  # the innermost
        kind = str(config.model_type)
        below = {
            "falcon": getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False),
            "gpt_bigcode": getattr(config, "multi_query", False),
        }
        if ending in INTERLEAVED.get(kind, ()) and not below.get(kind, False):
            return kind
    return None
