"""The frozen weight under an adapter as a plain matrix, whether it is quantized, transposed or in shards."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from milora_lightning.lora import LoRALinear
from milora_lightning.quantization import decoded, holds_its_weight, refusal
from milora_lightning.quantized_base import unquantized
from milora_lightning.sharding import gather_to, is_sharded


def dense_weight(layer: LoRALinear) -> Tensor:
    """Return the frozen weight of an adapter's base layer as a matrix of shape (out, in).

    Raises:
        ValueError: If it is in shards, of an unknown kind (see :func:`milora_lightning.quantization.decoded`), or
            repacked by bitsandbytes for inference.
    """
    if is_sharded(layer.base_layer):
        raise ValueError("The weight is in shards on several ranks: analyze the checkpoint on one device instead.")
    return cast(Tensor, collected_weight(layer, 0))


def pretrained_weight(layer: LoRALinear, rank: int) -> Tensor | None:
    """Collect the weight that factors start from: as :func:`collected_weight`, but before quantization where known."""
    weight = collected_weight(layer, rank)
    return None if weight is None else unquantized(layer.base_layer, weight)


def collected_weight(layer: LoRALinear, rank: int) -> Tensor | None:
    """Collect a weight (out, in), where it is in shards, on one rank, while the others get None; all must call this.

    Raises:
        ValueError: If it is sharded in more than one way, of an unknown kind (see
            :func:`milora_lightning.quantization.decoded`), or repacked by bitsandbytes for inference.
    """
    base = layer.base_layer
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError("bitsandbytes has repacked it for inference on this CPU; initialize before evaluating.")
    if is_sharded(base) and not holds_its_weight(base):
        raise ValueError(refusal(base))
    weight = gather_to(base.weight.detach(), rank)
    if weight is None:
        return None
    weight = decoded(base, weight)
    weight = weight.T if layer.transposed else weight
    if weight.shape != (layer.out_features, layer.in_features):
        raise ValueError(refusal(base))
    return weight
