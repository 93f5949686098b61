"""Communication within a tensor-parallel group in the forward and backward passes.

Each rank computes a part of a product. A tensor that all ranks have (activations, replicated factors) gets a part of
its gradient on each rank; these are summed in backward. A tensor of which each rank has a partial sum is summed in
forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_gradients(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return a tensor that is the same on all ranks of a group, and sum its gradient over them in backward.

    Args:
        tensor: The tensor.
        group: The group of ranks.
    """
    return _SumGradients.apply(tensor, group)  # type: ignore[no-any-return, no-untyped-call]


def sum_parts(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum a tensor over the ranks of a group, in place; its gradient is the same on all of them.

    Args:
        tensor: This rank's partial sum; overwritten.
        group: The group of ranks.
    """
    return _SumParts.apply(tensor, group)  # type: ignore[no-any-return, no-untyped-call]


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(tensor)
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
