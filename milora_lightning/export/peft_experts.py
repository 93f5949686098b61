"""PEFT's layout of the factors of experts: those of two long linear layers."""

from __future__ import annotations

from torch import Tensor

from milora_lightning.adapters.experts import LoRAExperts, is_stack


def side_by_side(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate experts' A (experts, n, in) along the rows and their B (experts, out, n) along the columns.

    In B, the first columns of all experts come first, then the second columns.

    >>> import torch
    >>> A, B = torch.randn(3, 2, 4), torch.randn(3, 5, 2)
    >>> [tuple(part.shape) for part in side_by_side(A, B)]
    [(6, 4), (5, 6)]
    >>> all(torch.equal(a, b) for a, b in zip(one_by_one(*side_by_side(A, B), 3), (A, B), strict=True))
    True
    """
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def one_by_one(A: Tensor, B: Tensor, matrices: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`side_by_side`."""
    return A.view(matrices, -1, A.shape[1]), B.view(B.shape[0], -1, matrices).permute(2, 0, 1)


def as_peft_sees(layer: LoRAExperts, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange experts' A and B if PEFT takes the other dimension of their matrices for the input."""
    return (A, B) if input_first(layer.base_layer) == layer.transposed else (B.mT, A.mT)


def input_first(stack: object) -> bool:
    """Whether PEFT regards the matrices of a stack as (in, out)."""
    return is_stack(stack) and bool(getattr(stack.experts, "is_transposed", False))
