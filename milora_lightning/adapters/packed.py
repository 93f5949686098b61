"""Adapters of ``nn.MultiheadAttention``'s projections, whose weights are its parameters rather than layers.

Query, key and value have one weight, ``in_proj_weight`` (3·embed, embed), which gets an adapter under the name
``in_proj``; or three, ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``, under ``q_proj``, ``k_proj``,
``v_proj``. ``attention.py`` calls these adapters.
"""

from __future__ import annotations

from typing import Any, TypeGuard, cast

import torch.nn.functional as F
from torch import Tensor, nn

from milora_lightning.adapters.autograd import lora_linear
from milora_lightning.adapters.held_weight import HeldWeight
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import in_autocast_dtype

PROJECTIONS = ("in_proj", "q_proj", "k_proj", "v_proj")
"""The names of the adapters; those of the parameters end in ``_weight``."""


class PackedWeight(HeldWeight):
    """A projection's weight (out, in) in an ``nn.MultiheadAttention``, as an adapter's base layer.

    Args:
        attention: The module that holds it.
        name: One of ``PROJECTIONS``.
    """

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        super().__init__(attention, f"{name}_weight")
        self.name = name
        self.out_features, self.in_features = self.weight.shape

    @property
    def bias(self) -> Tensor | None:
        """This projection's part of the common bias (out,)."""
        bias = cast("Tensor | None", self.holder._parameters["in_proj_bias"])
        if bias is None or self.name == "in_proj":
            return bias
        return bias.chunk(3)[PROJECTIONS.index(self.name) - 1]


def is_packed(layer: object) -> TypeGuard[PackedWeight]:
    """Whether this is a projection's weight that acts as a layer."""
    return isinstance(layer, PackedWeight)


class LoRAPacked(LoRALinear):
    """The adapter of a projection in an ``nn.MultiheadAttention``: a :class:`LoRALinear` called by the attention.

    Args:
        base_layer: The projection's weight.
        r: Rank of the factors.
        **options: The other arguments of :class:`LoRALinear`.

    Raises:
        TypeError: If ``base_layer`` is not such a weight.
    """

    fits = staticmethod(is_packed)
    _ADAPTS = "weights of nn.MultiheadAttention"

    def forward(self, input: Tensor, rows: slice = slice(None)) -> Tensor:
        """Compute the projection's output (..., out), or only the features of the given rows of the weight."""
        weight, bias, x = self.base_layer.weight, self.bias, input
        A, B, initial_A, initial_B = self.factors
        if rows != slice(None):
            weight, bias, B = weight[rows], None if bias is None else bias[rows], B[rows]
            initial_B = None if initial_B is None else initial_B[rows]
        if not self.enabled:
            return F.linear(x, weight, bias)
        self._check_can_train()
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or self._needs_plain_operations():
            y = F.linear(x, weight, bias)
            return y + self.update(x)[..., rows].to(y.dtype)
        x = in_autocast_dtype(x)
        return lora_linear(x, weight, bias, A, B, initial_A, initial_B, self.scaling, self._dropout)

    def merge(self) -> None:
        """Do nothing: attention reads the sum W + ΔW itself where that loses no precision."""


def projections(attention: nn.MultiheadAttention) -> dict[str, PackedWeight]:
    """Return the projections of an attention by their names, whether or not they have adapters.

    >>> list(projections(nn.MultiheadAttention(4, 2))), list(projections(nn.MultiheadAttention(4, 2, kdim=6)))
    (['in_proj'], ['q_proj', 'k_proj', 'v_proj'])
    """
    has = attention._parameters
    return {name: PackedWeight(attention, name) for name in PROJECTIONS if has.get(f"{name}_weight") is not None}


def adapter_of(attention: nn.Module, name: str) -> LoRAPacked | None:
    """Return the adapter of a projection, or None."""
    adapter: Any = attention._modules.get(name)
    return adapter if isinstance(adapter, LoRAPacked) else None
