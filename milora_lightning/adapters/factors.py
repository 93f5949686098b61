"""The arithmetic of an adapter's factors, as pure functions of tensors.

A weight W (out, in) with singular triplets U (out, r), S (r,), Vᵀ (r, in) gives the initial factors
A₀ = √(S/s) Vᵀ (r, in) and B₀ = U √(S/s) (out, r), so that s B₀A₀ = U S Vᵀ is that part of W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from milora_lightning.config import Init
from milora_lightning.linalg.singular import SingularSlice, Slice, singular_slice

Factors = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]
"""A (r, in), B (out, r), and their initial values A₀ and B₀, or None for both where B₀A₀ is zero."""

SLICES: dict[Init, Slice] = {"milora": "minor", "pissa": "principal", "middle": "middle", "random": "random"}


def initial_factors(
    weight: Tensor,
    r: int,
    scaling: float = 1.0,
    init: Init = "milora",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute where the factors of one weight start.

    For the singular triplets (U, S, Vᵀ) that ``init`` chooses, A = √(S/s) Vᵀ and B = U √(S/s), so that s·B A is
    their part of the weight (MiLoRA, arXiv 2406.09044, section 3; PiSSA, arXiv 2404.02948, section 3). A
    component whose singular value is zero would never receive a gradient; it starts as in LoRA, with its right
    vector in A and zeros in B.

    Args:
        weight: Weight of shape (out, in).
        r: Number of triplets.
        scaling: The scale s = lora_alpha / r, positive.
        init: Which triplets, or ``"lora"`` for A Kaiming-uniform and B zero.
        generator: CPU generator for the random choices.

    Returns:
        ``lora_A`` (r, in) and ``lora_B`` (out, r), float32 on the weight's device.

    Raises:
        ValueError: If the weight is not a finite matrix, or r is out of range.

    >>> A, B = initial_factors(torch.diag(torch.tensor([4.0, 2.0, 1.0])), r=1)
    >>> (B @ A).abs()
    tensor([[0., 0., 0.],
            [0., 0., 0.],
            [0., 0., 1.]])
    """
    if init == "lora":
        bound = 1 / math.sqrt(weight.shape[1])  # the bound of kaiming_uniform_(a=√5), as in LoRA
        lora_A = torch.empty(r, weight.shape[1], device="cpu").uniform_(-bound, bound, generator=generator)
        return lora_A.to(weight.device), torch.zeros(weight.shape[0], r, device=weight.device)
    return scaled_factors(initial_triplets(weight, r, init, generator), scaling)


def initial_triplets(weight: Tensor, r: int, init: Init, generator: torch.Generator | None = None) -> SingularSlice:
    """Compute the triplets that factors start from, in float32; singular values below rounding are exactly zero.

    Args:
        weight: Weight of shape (out, in).
        r: Number of triplets.
        init: Which triplets; any but ``"lora"``.
        generator: CPU generator for ``"random"``.

    Returns:
        U (out, r), S (r,) and Vh (r, in), on the weight's device.

    Raises:
        ValueError: If the weight is not a finite matrix, or r is out of range.
    """
    U, S, Vh = singular_slice(weight, r, SLICES[init], generator)
    norm = torch.linalg.matrix_norm(weight.detach().to(S.dtype))
    vanishing = torch.finfo(S.dtype).eps * max(weight.shape) * norm >= S
    return SingularSlice(U.float(), S.masked_fill(vanishing, 0.0).float(), Vh.float())


def scaled_factors(triplets: SingularSlice, scaling: float) -> tuple[Tensor, Tensor]:
    """Turn triplets into ``lora_A`` (r, in) and ``lora_B`` (out, r), as :func:`initial_factors` describes.

    >>> A, B = scaled_factors(SingularSlice(torch.ones(2, 1), torch.tensor([8.0]), torch.ones(1, 3)), scaling=2.0)
    >>> A, B[0]
    (tensor([[2., 2., 2.]]), tensor([2.]))
    """
    U, S, Vh = triplets
    root = (S / scaling).sqrt()
    return torch.where(S == 0, 1.0, root)[:, None] * Vh, U * root


def stack_factors(
    lora_A: Tensor,
    lora_B: Tensor,
    initial_A: Tensor | None,
    initial_B: Tensor | None,
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the update s (B A − B₀A₀) as one product of two factors.

    With ΔA = A − A₀ and ΔB = B − B₀, s [ΔB, B₀] [A; ΔA] equals s (B A − B₀A₀). It is exactly zero at the start, and in
    lower precision its rounding error is relative to the update, not to the much larger initial product.

    Args:
        lora_A: Factor of shape (r, in).
        lora_B: Factor of shape (out, r).
        initial_A: Its initial value, or None where the initial product is zero (LoRA's own start).
        initial_B: Likewise.
        scaling: The scale s, which the second factor includes.
        dtype: Dtype of the result; by default that of the factors. The differences are formed before rounding to it.

    Returns:
        The stacked factors of shapes (2r, in) and (out, 2r), or of ``lora_A`` and ``lora_B`` alone where there are no
        initial factors.

    >>> A, B = torch.randn(2, 5), torch.randn(3, 2)
    >>> A2, B2 = stack_factors(A, B, A, B)
    >>> (B2 @ A2).abs().max().item()
    0.0
    """
    A, B = lora_A, lora_B
    if initial_A is not None and initial_B is not None:
        A, B = torch.cat([A, A - initial_A]), torch.cat([B - initial_B, initial_B], dim=1)
    return A.to(dtype or A.dtype), (B if scaling == 1 else scaling * B).to(dtype or B.dtype)
