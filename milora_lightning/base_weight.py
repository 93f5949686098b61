"""The frozen weight under an adapter as a plain matrix, whether it is quantized, transposed or in shards."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from milora_lightning.lora import LoRALinear
from milora_lightning.sharding import gather_to, is_sharded


def dense_weight(layer: LoRALinear) -> Tensor:
    """Return the frozen weight of an adapter's base layer as a matrix of shape (out, in).

    Raises:
        ValueError: If it is in shards, quantized by something other than bitsandbytes, or repacked by it for inference.
    """
    if is_sharded(layer.base_layer):
        raise ValueError("The weight is in shards on several ranks: analyze the checkpoint on one device instead.")
    return cast(Tensor, collected_weight(layer, 0))


def collected_weight(layer: LoRALinear, rank: int) -> Tensor | None:
    """Collect a weight (out, in), where it is in shards, on one rank, while the others get None; all must call this.

    Raises:
        ValueError: If it is sharded in more than one way, quantized by something other than bitsandbytes, or repacked
            by it for inference.
    """
    base = layer.base_layer
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError("bitsandbytes has repacked it for inference on this CPU; initialize before evaluating.")
    weight = gather_to(base.weight.detach(), rank)
    if weight is None:
        return None
    if not weight.is_floating_point():
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes, if installed

        weight = dequantize_bnb_weight(base.weight, getattr(base, "state", None)).detach()
    if not weight.is_floating_point():
        raise ValueError(
            f"its {type(base).__name__} holds {weight.dtype} codes that cannot be turned back into a weight here; load "
            "the model unquantized, or quantized by bitsandbytes."
        )
    return weight.T if layer.transposed else weight
