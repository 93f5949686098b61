"""The adapter of a convolution: a narrow convolution with r filters, followed by a pointwise one, as in PEFT.

                 x (batch, in, *size)
            ┌────────┴────────┐
            │              dropout
    W (out, in, *kernel)   [A; A − A₀]  (2r, in, *kernel), with W's stride, padding and dilation
            │     s · [B − B₀, B₀]  (out, 2r, 1, …)
            └────────┬────────┘
                   + bias
                 y (batch, out, *size)  =  W x + bias + s (B A − B₀A₀) x

A kernel is a matrix (out, in · entries of a filter) that multiplies patches of x. Its factors are stored like those of
a linear layer: A (r, in · entries) and B (out, r). In a grouped convolution each group of filters is a separate matrix.
It has r / groups rows of A, and its rows of B (out, r / groups) are multiplied by these only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milora_lightning.adapters.added_update import AddedUpdate
from milora_lightning.adapters.dropout import drop, scales
from milora_lightning.adapters.factors import stack_factors
from milora_lightning.adapters.linear_layers import is_convolution
from milora_lightning.utils.compat.torch import convolve

_POINTWISE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
READ_BY_MODELS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


class LoRAConv(AddedUpdate):
    """A convolution with a low-rank update that starts at zero: a :class:`LoRALinear` on patches of its input.

    Args:
        base_layer: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, with any stride, padding, dilation and groups.
        r: Rank of the factors over all groups; a multiple of the number of groups.
        **options: The other arguments of :class:`LoRALinear`.

    Attributes:
        lora_A: Trainable factor (r, in / groups · entries of the kernel).
        lora_B: Trainable factor (out, r / groups).

    Raises:
        TypeError: If ``base_layer`` is not a convolution, or has a custom ``forward``.
        ValueError: If ``r`` is not a multiple of the number of groups.
    """

    fits = staticmethod(is_convolution)
    _ADAPTS = "nn.Conv1d, nn.Conv2d or nn.Conv3d"
    in_channels: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    groups: int

    def __init__(self, base_layer: nn.Module, r: int, *options: Any, **named: Any) -> None:
        super().__init__(base_layer, r, *options, **named)
        for name in READ_BY_MODELS:
            setattr(self, name, getattr(base_layer, name))

    def update(self, x: Tensor) -> Tensor:
        """Compute the update's part of the output, s (B A − B₀A₀) x (batch, out, *size), for x (batch, in, *size)."""
        p, seen = self._dropout, x
        if p:
            seen = drop(x, p)[0] * scales(x.device, p)[1]
        A, B = stack_factors(*self.factors, self.scaling, x.dtype)
        update = self._product(seen, A, B)
        if p and self.dropout_on == "product" and self.initial_A is not None and self.initial_B is not None:
            update = update + self._product(seen - x, self.initial_A.to(x.dtype), self.scaling * self.initial_B)
        return update

    def delta_weight(self) -> Tensor:
        """Compute ΔW = s (B A − B₀A₀) as a matrix (out, in / groups · entries), in the factors' precision."""
        return grouped_product(*stack_factors(*self.factors, self.scaling), self.groups, self.r)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Convert a kernel (out, in / groups, *kernel) to a matrix (out, in / groups · entries)."""
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Convert a matrix with any number of rows to a kernel."""
        return matrix.reshape(len(matrix), self.in_channels // self.groups, *self.kernel_size)

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Convolve x with each group's rows of A (one or two stacks of r), and the result pointwise with B."""
        dimensions = len(self.kernel_size)
        hidden = convolve(self.base_layer, x, self.as_weight(by_group(A, self.groups, self.r).flatten(0, 1)))
        pointwise = B.to(x.dtype).reshape(*B.shape, *[1] * dimensions)
        return _POINTWISE[dimensions](hidden, pointwise, groups=self.groups)


def by_group(A: Tensor, groups: int, r: int) -> Tensor:
    """Reorder stacks of r rows by group: (n · r, in) becomes (groups, n · r / groups, in).

    Args:
        A: Factor (n · r, in), n stacks of r rows.
        groups: Number of groups.
        r: Rank of one stack.

    >>> by_group(torch.arange(8)[:, None], groups=2, r=4).tolist()
    [[[0], [1], [4], [5]], [[2], [3], [6], [7]]]
    """
    stacks = A.view(-1, groups, r // groups, A.shape[1])
    return stacks.transpose(0, 1).reshape(groups, -1, A.shape[1])


def grouped_product(A: Tensor, B: Tensor, groups: int, r: int) -> Tensor:
    """Multiply each group's rows of B by its rows of A: (out, n · r / groups) and (n · r, in) give (out, in).

    Args:
        A: Factor (n · r, in), n stacks of r rows.
        B: Factor (out, n · r / groups).
        groups: Number of groups.
        r: Rank of one stack.
    """
    if groups == 1:
        return B @ A
    return torch.bmm(B.view(groups, -1, B.shape[1]), by_group(A, groups, r)).flatten(0, 1)
