"""A certificate for computed singular triplets: they are returned only if they are provably close to the exact ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from milora_lightning.linalg.ritz import Triplets, residual, ritz_triplets

_EPS = torch.finfo(torch.float64).eps
_MAX_ANGLE = 7e-9  # ‖sin Θ‖_F to the exact subspace; projectors then differ by √2 times that, below 1e-8


class Candidate(NamedTuple):
    """Eigenpairs ``low`` to ``high`` of W Wᵀ (k, k), counted from the largest, as computed by a solver.

    Attributes:
        low: Index of the first.
        high: Index after the last.
        values: Eigenvalues (high - low,), ascending.
        vectors: Eigenvectors (k, high - low), not necessarily orthonormal.
        cholesky: The Cholesky factor of W Wᵀ if these are the smallest eigenpairs and the solver has computed it.
        uncertainty: Bound on the error of ``values``, and of the solver's other eigenvalues, compared with the
            eigenvalues of W Wᵀ at the same index; None for the rounding error of a float64 Gram matrix.
    """

    low: int
    high: int
    values: Tensor
    vectors: Tensor
    cholesky: Tensor | None = None
    uncertainty: Tensor | None = None


def certified_triplets(W: Tensor, energy: Tensor, start: int, r: int, candidate: Candidate) -> Triplets | None:
    """Compute triplets ``start`` to ``start + r`` of W (k, n), k ≤ n, from a candidate, or None if not certified.

    With an orthonormal Q near the left vectors and the SVD QᵀW = X S Vᵀ, U = QX obeys UᵀW = S Vᵀ exactly, so the whole
    error is E = W V - U S. To first order, column i of E turns triplet i by at most ‖Eᵢ‖ max(σ, σᵢ) / |σ² - σᵢ²|, where
    σ is the nearest singular value outside Q, and changes σᵢ by about the square of that, relatively.

    A candidate has more eigenvectors than are wanted, so that σ is well separated from the σᵢ. The accuracy is then
    limited by the condition number σ_max / σ at the edge of Q, not by the weight's, which is far larger.

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
        return None  # one vector of a cluster appears twice, and another is missing

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
    """Refine the right vectors of the smallest triplets, and return these, or None if they cannot be certified.

    A right vector Wᵀu / σ carries the rounding of a product with σ_max, divided by a small σ. W⁻¹ E, computed with a
    Cholesky factor L of W Wᵀ, removes it. Then neither W V = U S nor UᵀW = S Vᵀ is exact. With E and F their residuals,
    triplet i turns towards a triplet j outside by at most |uⱼᵀEᵢ| σⱼ / (σⱼ² - σᵢ²) plus the same with vⱼᵀFᵢ. In total
    that is at most (‖L⁻¹Eᵢ‖ + ‖Fᵢ‖ / σ) / (1 - σᵢ² / σ²), where σ is the ``edge``, the nearest singular value outside.
    """
    U, sigma, Vh = triplets
    E = E - U @ (U.mT @ E)  # remove the rounding error, which would make Vh less orthonormal
    correction = torch.cholesky_solve(E, L).mT @ W
    Vh = Vh - correction
    E = torch.linalg.solve_triangular(L, W @ Vh.mT - U * sigma, upper=False)
    F = W.mT @ U - Vh.mT * sigma
    turn = torch.linalg.vector_norm(E, dim=0) + torch.linalg.vector_norm(F, dim=0) / edge
    angle = turn / (1 - (sigma / edge).square())
    # Vh is orthonormal up to the square of the correction.
    if torch.linalg.vector_norm(angle) <= _MAX_ANGLE and torch.linalg.vector_norm(correction) <= 1e-7:
        return U, sigma, Vh
    return None
