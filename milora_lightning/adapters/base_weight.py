"""The frozen weight of an adapter's base layer as a plain matrix, even if it is quantized, transposed or sharded."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor, nn

from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import holds_its_weight
from milora_lightning.adapters.quantization import decoded, refusal
from milora_lightning.parallel.dtensor import gather_to_rank, is_sharded
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

STORED = "stored_weight"
"""Attribute of a quantized layer with its :class:`Stored` weight, set when a model is loaded."""

CLOSE = 0.5
"""Maximum relative distance of a weight from its quantized form: 4 bits give 0.1, an unrelated matrix 1.4."""


class Stored(Protocol):
    """The original weight of a quantized layer, which can be read from the model's files."""

    @property
    def quantization(self) -> str:
        """The kind of quantization, such as ``nf4``."""

    def read(self) -> Tensor:
        """Read the weight, in the file's layout."""


def dense_weight(layer: LoRALinear) -> Tensor:
    """Return the frozen weight of an adapter's base layer as a matrix of shape (out, in).

    Raises:
        ValueError: If it is sharded, of an unknown kind (see :func:`milora_lightning.adapters.quantization.decoded`),
            or repacked by bitsandbytes for inference.
    """
    if is_sharded(layer.base_layer):
        raise InvalidInputError(
            "The weight is in shards on several ranks: analyze the checkpoint on one device instead."
        )
    return cast(Tensor, collected_weight(layer, 0))


def pretrained_weight(layer: LoRALinear, rank: int) -> Tensor | None:
    """Gather the weight that factors are computed from: like :func:`collected_weight`, but unquantized if possible.

    Args:
        layer: The adapter.
        rank: The rank that gets a sharded weight.
    """
    weight = collected_weight(layer, rank)
    return None if weight is None else _unquantized(layer.base_layer, weight)


def collected_weight(layer: LoRALinear, rank: int) -> Tensor | None:
    """Return an adapter's frozen weight (out, in); a sharded one on one rank only, None on the others.

    All ranks must call this.

    Args:
        layer: The adapter.
        rank: The rank that gets a sharded weight.

    Raises:
        ValueError: If it is sharded in more than one way, of an unknown kind (see
            :func:`milora_lightning.adapters.quantization.decoded`), or repacked by bitsandbytes for inference.
    """
    base = layer.base_layer
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise InvalidInputError("bitsandbytes has repacked it for inference on this CPU; initialize before evaluating.")
    if is_sharded(base) and not holds_its_weight(base):
        raise InvalidInputError(refusal(base))
    weight = gather_to_rank(base.weight.detach(), rank)
    if weight is None:
        return None
    weight = decoded(base, weight)
    weight = layer.as_matrix(weight)
    if weight.shape[-2:] != (layer.out_features, layer.in_features):
        raise InvalidInputError(refusal(base))
    return weight


def _unquantized(base: nn.Module, dequantized: Tensor) -> Tensor:
    """Return a quantized layer's original weight if it can be read, otherwise the dequantized one.

    Args:
        base: The layer.
        dequantized: The weight that it computes with (out, in); the original must be close to it.
    """
    stored: Stored | None = getattr(base, STORED, None)
    if stored is None:
        return dequantized
    weight = stored.read().to(dequantized.device)
    for candidate in (weight, weight.T) if weight.ndim == 2 else ():
        if candidate.shape == dequantized.shape:
            distance = (candidate.float() - dequantized.float()).norm()
            if not distance > CLOSE * candidate.float().norm():  # NaN passes here, and is reported by the decomposition
                return candidate
    warn(
        "What the model's files call a quantized weight is not what it was quantized from: adapters start from the "
        "dequantized weight there.",
        from_any_rank=True,
    )
    return dequantized
