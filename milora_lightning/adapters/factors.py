"""The arithmetic of an adapter's factors, as pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from milora_lightning.config import Init
from milora_lightning.linalg.singular import SingularSlice, Slice, singular_slice

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
    component whose singular value is zero would never receive a gradient that way; it starts as LoRA does, with
    its right vector in A and zeros in B.

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
        bound = 1 / math.sqrt(weight.shape[1])  # what kaiming_uniform_(a=√5) comes to
        lora_A = torch.empty(r, weight.shape[1]).uniform_(-bound, bound, generator=generator)
        return lora_A.to(weight.device), torch.zeros(weight.shape[0], r, device=weight.device)
    return scaled_factors(initial_triplets(weight, r, init, generator), scaling)


def initial_triplets(weight: Tensor, r: int, init: Init, generator: torch.Generator | None = None) -> SingularSlice:
    """Compute the triplets that factors start from, in float32, with exact zeros where singular values vanish.

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


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SVD of a product B A in float64 without forming it.

    Args:
        B: Factor of shape (out, n).
        A: Factor of shape (n, in).

    Returns:
        U (out, m), S (m,) descending and Vh (m, in), for m = min(n, out, in).

    >>> product_svd(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0, 0.0, 0.0]]))[1]
    tensor([6.], dtype=torch.float64)
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def stack_factors(
    lora_A: Tensor,
    lora_B: Tensor,
    initial_A: Tensor | None,
    initial_B: Tensor | None,
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the update s (B A − B₀A₀) as one product of two factors.

    s [ΔB, B₀] [A; ΔA] with ΔA = A − A₀ and ΔB = B − B₀ equals s (B A − B₀A₀), is exactly zero at the start, and its
    rounding in a lower precision is relative to the update rather than to the initial product.

    Args:
        lora_A: Factor of shape (r, in).
        lora_B: Factor of shape (out, r).
        initial_A: Its initial value, or None where the initial product is zero (LoRA's own start).
        initial_B: Likewise.
        scaling: The scale s, which goes into the second factor.
        dtype: What both are rounded to in the end; by default they keep the factors' dtype.

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
    return A.to(dtype or A.dtype), (scaling * B).to(dtype or B.dtype)
