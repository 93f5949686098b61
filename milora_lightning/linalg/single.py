"""Eigenpairs of a Gram matrix, computed in single precision and refined in double precision.

Consumer GPUs compute in float64 at 1/64 of their speed in float32. So the expensive parts, the Gram matrix and all of
its eigenvectors, are computed in float32 here; float64 products of the weight with a few vectors restore the accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from milora_lightning.linalg.certificate import Candidate
from milora_lightning.linalg.eigen import eigenpairs
from milora_lightning.linalg.ritz import residual, ritz_triplets

PASSES = 8
"""Maximum number of refinements; each multiplies the error by single precision's error relative to the gap."""

_PROBES, _FACTOR, _POWER = 20, 2.5, 3  # a norm is underestimated with a probability of 2.5⁻²⁰ = 1e-8


class SingleEigenpairs(NamedTuple):
    """All eigenpairs of W Wᵀ / ‖W‖²_F (k, k), computed in float32.

    Attributes:
        values: Eigenvalues (k,), ascending, as float64.
        vectors: Eigenvectors (k, k), float32.
        error: Bound on ‖W Wᵀ / ‖W‖²_F - V Λ Vᵀ‖, and so on the difference of eigenvalues with the same index (Weyl).
        skew: Bound on ‖VᵀV - 1‖: eigenvalues of V Λ Vᵀ are the ``values`` to this relative error (Ostrowski).
    """

    values: Tensor
    vectors: Tensor
    error: Tensor
    skew: Tensor

    def uncertainty(self, low: int) -> Tensor:
        """Bound the error of the eigenvalues from ``low`` on, counted from the largest, and of the one before them."""
        k = len(self.values)
        largest = self.values[k - max(low, 1)].abs()
        return self.error + self.skew * largest


def single_eigenpairs(W: Tensor, energy: Tensor) -> SingleEigenpairs:
    """Compute all eigenpairs of W Wᵀ, W (k, n) in float64 with ‖W‖²_F = ``energy``, in float32, and bound their error.

    The bounds come from products with random vectors (Halko, Martinsson and Tropp, arXiv 0909.4061, lemma 4.1), in
    float64, so they hold whatever the device's float32 products and eigensolver do.

    Raises:
        torch.linalg.LinAlgError: If the solver does not converge.
    """
    with full_precision():
        scaled = W.float().div_(energy.sqrt().float())
        G = scaled @ scaled.mT
        del scaled
        values, vectors = eigenpairs(G)
    values, exact = values.double(), vectors.double()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(W), _PROBES, dtype=torch.float64, generator=generator, device="cpu").to(W.device)
    error = _norm(lambda X: W @ (W.mT @ X) / energy - exact @ (values[:, None] * (exact.mT @ X)), start)
    skew = _norm(lambda X: exact.mT @ (exact @ X) - X, start)
    return SingleEigenpairs(values, vectors, error, skew)


def refined_candidate(
    W: Tensor, energy: Tensor, single: SingleEigenpairs, low: int, high: int, wanted: slice
) -> Candidate | None:
    """Refine eigenpairs that were computed in float32, as far as float64 can.

    With (σ, u, v) a triplet inside the span of the vectors ``low`` to ``high``, and e = W v - σ u its residual, the
    part of the exact left vector outside that span is, to first order, -(W Wᵀ - σ²)⁻¹ σ e. The float32 eigenpairs
    outside the span give that inverse with a relative error of their own error divided by the gap.

    Args:
        W: The weight (k, n), k ≤ n, float64.
        energy: ‖W‖²_F.
        single: Eigenpairs of W Wᵀ.
        low: Index of the first vector of the span, counted from the largest.
        high: Index after its last.
        wanted: Which of these to refine.

    Returns:
        The candidate, or None if single precision does not separate the wanted eigenvalues from those outside.
    """
    k = len(W)
    inside = slice(k - high, k - low)
    uncertainty = single.uncertainty(low)
    outside = torch.ones(k, dtype=torch.bool, device=W.device)
    outside[inside] = False
    vectors, best = single.vectors[:, inside].double(), math.inf
    for _ in range(PASSES):
        found = ritz_triplets(W, vectors)
        triplets = found.triplets(wanted)
        E = residual(W, triplets)
        size = float(torch.linalg.matrix_norm(E))
        if not size < best / 2:
            break
        best, vectors = size, found.Q @ found.X
        gap = single.values[:, None] - triplets[1].square() / energy
        if not (gap[outside].abs() > 4 * uncertainty).all():
            return None
        along = single.vectors.mT @ (E * (triplets[1] / energy)).float() / gap.float()
        along[inside] = 0
        corrected = vectors[:, wanted] - (single.vectors @ along).double()
        vectors[:, wanted] = corrected
    values = energy * single.values[inside]
    return Candidate(low, high, values, vectors, uncertainty=2 * energy * uncertainty)


def _norm(symmetric: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Bound the norm of a symmetric operator from above, by its powers, which depend less on the random start."""
    X = start
    for _ in range(_POWER):
        X = symmetric(X)
    largest: Tensor = torch.linalg.vector_norm(X, dim=0).max()
    return torch.pow(_FACTOR * math.sqrt(2 / math.pi) * largest, 1 / _POWER)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32 within this context, not in TensorFloat-32, which has three digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
