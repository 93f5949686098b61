"""Consecutive singular triplets without the others: from eigenpairs of the Gram matrix, if they are certified."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from torch import Tensor

from milora_lightning.linalg.certificate import Candidate, certified_triplets
from milora_lightning.linalg.eigen import NOT_CONVERGED, dense_eigenpairs, gram, smallest_eigenpairs
from milora_lightning.linalg.ritz import Triplets
from milora_lightning.linalg.single import refined_candidate, single_eigenpairs

LARGE = 3072
"""From this size on, LAPACK's tridiagonal reduction is limited by memory bandwidth, and the Krylov method is faster."""

SQUARE = 1.5
"""Up to this aspect ratio the smallest singular values are well separated, as the Krylov method needs them."""


def suits_krylov(k: int, n: int) -> bool:
    """Whether the Krylov method finds the smallest triplets of a weight with sides k ≤ n faster than LAPACK.

    Args:
        k: Length of the short side.
        n: Length of the long side.

    >>> suits_krylov(4096, 4096), suits_krylov(4096, 11008)
    (True, False)
    """
    return k >= LARGE and n <= SQUARE * k


def takes_all(k: int, r: int) -> bool:
    """Whether computing all k triplets costs no more than computing r of them.

    Args:
        k: Number of all triplets.
        r: Number of wanted triplets.

    >>> takes_all(576, 32), takes_all(576, 575)
    (False, True)
    """
    return min(r + 8, k) > k // 2


def certified_part(W: Tensor, energy: Tensor, start: int, r: int, single: bool) -> Triplets | None:
    """Compute triplets ``start`` to ``start + r`` of W (k, n), k ≤ n, or return None if they are not certified.

    Args:
        W: Weight in float64, short side first.
        energy: Its squared Frobenius norm.
        start: Index of the first triplet, in descending order of singular values.
        r: Number of triplets.
        single: Whether eigenvectors are computed in float32 first, and refined.
    """
    if not 1e-200 < energy < 1e200:
        return None  # its squares underflow or overflow, or it is zero
    for candidate in _candidates(W, energy, start, r, single):
        with suppress(*NOT_CONVERGED):
            triplets = certified_triplets(W, energy, start, r, candidate)
            if triplets is not None:
                return triplets
    return None


def _candidates(W: Tensor, energy: Tensor, start: int, r: int, single: bool) -> Iterator[Candidate]:
    """Compute eigenpairs of W Wᵀ (k, k) around the wanted ones, with growing effort."""
    k, n = W.shape
    margins = sorted({8, max(8, k // 8)})
    bounds = [(max(start - margin, 0), min(start + r + margin, k)) for margin in margins]
    # Twice this work is still far less than a full SVD, unless the SVD inside the span costs as much as that.
    bounds = [(low, high) for low, high in bounds if high - low <= k // 2]
    if single and bounds:
        with suppress(*NOT_CONVERGED):
            eigenpairs = single_eigenpairs(W, energy)
            for low, high in bounds:
                refined = refined_candidate(W, energy, eigenpairs, low, high, slice(start - low, start - low + r))
                if refined is not None:
                    yield refined
            del eigenpairs
    extra = max(8, r // 2)  # for the Krylov method, whose convergence depends on it
    if start + r == k and suits_krylov(k, n) and r + 2 * extra <= k // 4:
        with suppress(*NOT_CONVERGED):
            if (smallest := smallest_eigenpairs(W, r, extra)) is not None:
                yield Candidate(start - extra, k, *smallest)
        bounds = bounds[-1:]
    for low, high in bounds:
        with suppress(*NOT_CONVERGED if W.device.type == "cpu" else ()):  # a device's failure is reported to the user
            yield Candidate(low, high, *dense_eigenpairs(gram(W), low, high))
