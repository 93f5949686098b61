"""The arithmetic of an adapter's factors, as pure functions of tensors.

A weight W (out, in) with singular triplets U (out, r), S (r,), Vᵀ (r, in) gives the initial factors A₀ = √(S/s) Vᵀ (r,
in) and B₀ = U √(S/s) (out, r), so that s B₀A₀ = U S Vᵀ, the triplets' part of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from milora_lightning.linalg.singular import SingularSlice
from milora_lightning.starts import Statistics, find_start
from milora_lightning.starts.evaluation import evaluate
from milora_lightning.starts.methods import Pair

Factors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A (r, in), B (out, r), and their initial values A₀ and B₀, both None if B₀A₀ is zero."""


def initial_factors(
    weight: Tensor,
    r: int,
    scaling: float = 1.0,
    init: str = "milora",
    generator: torch.Generator | None = None,
    statistics: Statistics | None = None,
) -> Pair:
    """Compute the initial factors of one weight.

    For the singular triplets (U, S, Vᵀ) that ``init`` selects, A = √(S/s) Vᵀ and B = U √(S/s), so that s·B A is their
    part of the weight (MiLoRA, arXiv 2406.09044, section 3; PiSSA, arXiv 2404.02948, section 3). A component with
    singular value zero would never get a gradient, so it starts as in LoRA, with its right vector in A and zeros in B.

    Args:
        weight: Weight of shape (out, in).
        r: Rank of the factors.
        scaling: The scale s = lora_alpha / r, positive.
        init: Name of the start; see :class:`milora_lightning.LoRAConfig`.
        generator: CPU generator for the random choices.
        statistics: The layer's statistics, for starts that depend on data.

    Returns:
        ``lora_A`` (r, in) and ``lora_B`` (out, r), float32 on the weight's device.

    Raises:
        ValueError: If the weight is not a finite matrix, r is out of range, or a registered start returns something
            else than such factors.

    >>> A, B = initial_factors(torch.diag(torch.tensor([4.0, 2.0, 1.0])), r=1)
    >>> (B @ A).abs()
    tensor([[0., 0., 0.],
            [0., 0., 0.],
            [0., 0., 1.]])
    """
    return as_factors(evaluate(find_start(init), weight, r, generator, statistics), scaling)


def as_factors(found: SingularSlice | Pair, scaling: float) -> Pair:
    """Turn a start's triplets or factors into ``lora_A`` (r, in) and ``lora_B`` (out, r) for the scale s."""
    return scaled_factors(found, scaling) if isinstance(found, SingularSlice) else found


def scaled_factors(triplets: SingularSlice, scaling: float) -> tuple[Tensor, Tensor]:
    """Turn triplets into ``lora_A`` (r, in) and ``lora_B`` (out, r) as described in :func:`initial_factors`.

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

    With ΔA = A − A₀ and ΔB = B − B₀, s [ΔB, B₀] [A; ΔA] equals s (B A − B₀A₀). This is exactly zero at the start, and
    in low precision its rounding error is relative to the update rather than to the much larger initial product.

    Args:
        lora_A: Factor of shape (r, in).
        lora_B: Factor of shape (out, r).
        initial_A: Initial value of ``lora_A``, or None if the initial product is zero (as in LoRA).
        initial_B: Initial value of ``lora_B``, or None.
        scaling: The scale s; it goes into the second factor.
        dtype: Dtype of the result, by default that of the factors; the differences are computed before rounding.

    Returns:
        The stacked factors (2r, in) and (out, 2r); without initial factors, (r, in) and (out, r).

    >>> A, B = torch.randn(2, 5), torch.randn(3, 2)
    >>> A2, B2 = stack_factors(A, B, A, B)
    >>> (B2 @ A2).abs().max().item()
    0.0
    """
    A, B = lora_A, lora_B
    if initial_A is not None and initial_B is not None:
        A, B = torch.cat([A, A - initial_A], dim=-2), torch.cat([B - initial_B, initial_B], dim=-1)
    return A.to(dtype or A.dtype), (B if scaling == 1 else scaling * B).to(dtype or B.dtype)
