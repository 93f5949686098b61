"""A certificate for computed singular triplets: they are returned only if they are provably close to the exact ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from milora_lightning.linalg.ritz import Triplets, residual, ritz_triplets

_EPS = torch.finfo(torch.float64).eps
_MAX_ANGLE = 7e-9  # ‖sin Θ‖_F to the exact subspace; projectors then differ by √2 times that, below 1e-8


class Candidate(NamedTuple):
    """Eigenpairs ``low`` to ``high`` of W Wᵀ (k, k), counted from the largest, that a solver has found.

    Attributes:
        low: Index of the first.
        high: Index after the last.
        values: Eigenvalues (high - low,), ascending.
        vectors: Eigenvectors (k, high - low), not necessarily orthonormal.
        cholesky: The Cholesky factor of W Wᵀ where these are the smallest eigenpairs and the solver has computed it.
        uncertainty: Bound on the distance of ``values``, and of the solver's others, to the eigenvalues of W Wᵀ of the
            same index; None for what rounding does to a Gram matrix in float64.
    """

    low: int
    high: int
    values: Tensor
    vectors: Tensor
    cholesky: Tensor | None = None
    uncertainty: Tensor | None = None


def certified_triplets(W: Tensor, energy: Tensor, start: int, r: int, candidate: Candidate) -> Triplets | None:
    """Compute triplets ``start`` to ``start + r`` of W (k, n), k ≤ n, from a candidate, or None where in doubt.

    With an orthonormal Q near the left vectors and the SVD QᵀW = X S Vᵀ, U = QX obeys UᵀW = S Vᵀ exactly, so
    all error is in E = W V - U S. To first order, column i of E turns triplet i by at most
    ‖Eᵢ‖ max(σ, σᵢ) / |σ² - σᵢ²|, with σ the nearest one outside Q, and changes σᵢ, relatively, by about the
    square of that.

    A candidate has more eigenvectors than are wanted, so that σ is well away from the σᵢ: what limits the accuracy is
    then the condition number σ_max / σ at the edge of Q, not the far larger one of the weight.

    Args:
        W: The weight, float64.
        energy: ‖W‖²_F.
        start: Index of the first triplet, from ``candidate.low``.
        r: Number of triplets.
        candidate: Eigenpairs around the wanted ones.
    """
    k, (low, high, eigenvalues, vectors, cholesky, uncertainty) = W.shape[0], candidate
    found = ritz_triplets(W, vectors)
    S = found.S

    # Below it, squared singular values drown in the rounding of the Gram matrix.
    noise = k * _EPS * energy if uncertainty is None else uncertainty
    if not ((S.square() - eigenvalues.flip(0)).abs() <= noise).all():
        return None  # a vector of a cluster came twice, and another one is missing

    triplets = found.triplets(slice(start - low, start - low + r))
    sigma = triplets[1]
    E = residual(W, triplets)
    if cholesky is not None:
        return _certified_smallest(W, cholesky, triplets, E, S[0])
    size = torch.linalg.vector_norm(E, dim=0)
    rounding = 10 * _EPS * energy.sqrt()  # no SVD in float64 leaves a smaller residual
    for is_edge, edge in ((low > 0, S[0]), (high < k, S[-1])):
        if not is_edge:
            continue
        larger = torch.maximum(edge, sigma)
        gap = ((edge.square() - sigma.square()).abs() - noise).clamp_min(0)
        angle = torch.where(size <= rounding, 0.0, size * larger / gap)
        if (larger.square() <= noise).any() or not torch.linalg.vector_norm(angle) <= _MAX_ANGLE:
            return None
    return triplets


def _certified_smallest(W: Tensor, L: Tensor, triplets: Triplets, E: Tensor, edge: Tensor) -> Triplets | None:
    """Refine the right vectors of the smallest triplets, and return them, or None where in doubt.

    A right vector Wᵀu / σ carries the rounding of a product with σ_max, divided by a small σ. W⁻¹ E takes that out,
    with a Cholesky factor L of W Wᵀ. Then neither W V = U S nor UᵀW = S Vᵀ is exact: with E and F their
    differences, triplet i turns towards triplet j outside by at most |uⱼᵀEᵢ| σⱼ / (σⱼ² - σᵢ²) and as much with
    vⱼᵀFᵢ. Altogether that is (‖L⁻¹Eᵢ‖ + ‖Fᵢ‖ / σ) / (1 - σᵢ² / σ²) or less, with σ the ``edge``, the nearest one.
    """
    U, sigma, Vh = triplets
    E = E - U @ (U.mT @ E)  # rounding, which would cost Vh its orthonormality
    correction = torch.cholesky_solve(E, L).mT @ W
    Vh = Vh - correction
    E = torch.linalg.solve_triangular(L, W @ Vh.mT - U * sigma, upper=False)
    F = W.mT @ U - Vh.mT * sigma
    turn = torch.linalg.vector_norm(E, dim=0) + torch.linalg.vector_norm(F, dim=0) / edge
    angle = turn / (1 - (sigma / edge).square())
    # The square of the correction is how far Vh still is from orthonormal.
    if torch.linalg.vector_norm(angle) <= _MAX_ANGLE and torch.linalg.vector_norm(correction) <= 1e-7:
        return U, sigma, Vh
    return None
