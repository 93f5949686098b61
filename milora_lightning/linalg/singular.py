"""One part of a weight's singular spectrum, exactly, without paying for the rest of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Literal, NamedTuple, get_args

import scipy.linalg
import torch
from torch import Tensor

from milora_lightning.linalg.eigen import dense_eigenpairs, gram, smallest_eigenpairs
from milora_lightning.utils.errors import InvalidInputError

Slice = Literal["minor", "principal", "middle", "random"]

LARGE = 3072
"""From this size on LAPACK's reduction to a tridiagonal matrix waits for memory, and the Krylov method is faster."""

SQUARE = 1.5
"""Up to this aspect ratio the singular values fall to zero: the smallest stand out, as the Krylov method needs it."""

_EPS = torch.finfo(torch.float64).eps
_MAX_ANGLE = 7e-9  # ‖sin Θ‖_F to the exact subspace; projectors then differ by √2 times that, below 1e-8


class SingularSlice(NamedTuple):
    """Some singular triplets of a weight of shape (out, in): ``U * S @ Vh`` is their part of it.

    Attributes:
        U: Left singular vectors as columns, shape (out, r).
        S: Singular values in descending order, shape (r,).
        Vh: Right singular vectors as rows, shape (r, in).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


def singular_slice(
    weight: Tensor, r: int, which: Slice = "minor", generator: torch.Generator | None = None
) -> SingularSlice:
    """Compute r singular triplets of a weight.

    Of the k = min(out, in) triplets in descending order, MiLoRA trains the last r and keeps the others frozen
    (MiLoRA, arXiv 2406.09044, section 3). Only what is asked for gets computed: eigenvectors of the float64 Gram
    matrix of the short side span the wanted left vectors, found by a Krylov method for the smallest of a large one
    and by LAPACK otherwise, and a small SVD inside that span removes the loss of digits that squaring
    brings. The residual then bounds the error. Where it does not certify singular values within 1e-6 (relative) and
    subspaces within 1e-8 (projectors) of a full float64 SVD, that full SVD is taken.

    Args:
        weight: Floating-point weight of shape (out, in), on any device, in any layout. It is not modified.
        r: Number of triplets, from 1 to k.
        which: ``"minor"`` for the last r, ``"principal"`` for the first r, ``"middle"`` for those from index
            (k - r) // 2, ``"random"`` for r indices drawn without replacement.
        generator: CPU generator for ``"random"``; torch's default generator when None.

    Returns:
        U (out, r), S (r,) descending and Vh (r, in), without gradient, on the weight's device; float64, except
        on devices that have none (mps), where the result of the float64 computation is rounded to float32.

    Raises:
        ValueError: If ``which`` is unknown.
        ValueError: If the weight is not a floating-point matrix.
        ValueError: If the weight is on the meta device.
        ValueError: If r is not between 1 and k.
        ValueError: If the weight holds NaN or infinite entries.

    >>> U, S, Vh = singular_slice(torch.diag(torch.tensor([4.0, 1.0, 2.0, 3.0])), r=2)
    >>> S
    tensor([2., 1.], dtype=torch.float64)
    >>> (U * S @ Vh).diagonal()
    tensor([0., 1., 2., 0.], dtype=torch.float64)
    """
    if which not in get_args(Slice):
        raise InvalidInputError(f"unknown slice {which!r}: choose one of {', '.join(get_args(Slice))}")
    if weight.ndim != 2:
        raise InvalidInputError(
            f"a weight of shape {tuple(weight.shape)} has no singular vectors: pass a matrix (out, in)"
        )
    if not weight.is_floating_point():
        raise InvalidInputError(f"a weight of {weight.dtype} cannot be decomposed: pass it in a floating-point dtype")
    if weight.is_meta:
        raise InvalidInputError("a weight on the meta device has no values: load it before decomposing it")
    k = min(weight.shape)
    if not 1 <= r <= k:
        raise InvalidInputError(
            f"a weight of shape {tuple(weight.shape)} has {k} triplets, not {r}: set r from 1 to {k}"
        )

    home = weight.device
    no_double = home.type == "mps"
    W = (weight.detach().cpu() if no_double else weight.detach()).to(torch.float64)
    energy = torch.linalg.matrix_norm(W).square()
    if not energy.isfinite() and (bad := int(W.numel() - torch.isfinite(W).sum())):
        raise InvalidInputError(f"{bad} of the weight's {W.numel()} entries are NaN or infinite: check the checkpoint")

    tall = W.shape[0] > W.shape[1]
    if tall:
        W = W.mT  # short side first: the Gram matrix is (k, k)
    if which == "random":
        index = torch.randperm(k, generator=generator, device="cpu")[:r].sort().values
        U, S, Vh = _full(W, index)
    else:
        start = {"minor": k - r, "principal": 0, "middle": (k - r) // 2}[which]
        U, S, Vh = _partial(W, energy, start, r) or _full(W, torch.arange(start, start + r, device="cpu"))
    if tall:
        U, Vh = Vh.mT, U.mT
    # Contiguous, because callers broadcast and save these, and because a view would keep its larger base alive.
    triplets = (x.clone(memory_format=torch.contiguous_format) for x in (U, S, Vh))
    return SingularSlice(*(x.to(home, torch.float32) if no_double else x for x in triplets))


def _full(W: Tensor, index: Tensor) -> SingularSlice:
    """Take the triplets at ``index`` out of all of them."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    index = index.to(W.device)
    return SingularSlice(U[:, index], S[index], Vh[index])


def _partial(W: Tensor, energy: Tensor, start: int, r: int) -> SingularSlice | None:
    """Compute triplets ``start`` to ``start + r`` of W (k, n), k ≤ n, or None where the result stays in doubt."""
    if not 1e-200 < energy < 1e200:
        return None  # its squares underflow or overflow, or it is zero
    for low, high, eigenvalues, Q, L in _candidates(W, start, r):
        triplets = _certified(W, energy, slice(start - low, start - low + r), low, high, eigenvalues, Q, L)
        if triplets is not None:
            return triplets
    return None


def _candidates(W: Tensor, start: int, r: int) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor | None]]:
    """Compute eigenpairs ``low`` to ``high`` of W Wᵀ (k, k) around the wanted ones, with growing effort."""
    k, n = W.shape
    margins = sorted({8, max(8, k // 8)})
    extra = max(8, r // 2)  # for the Krylov method, whose convergence depends on it
    if start + r == k >= LARGE and n <= SQUARE * k and r + 2 * extra <= k // 4:
        if (found := smallest_eigenpairs(W, r, extra)) is not None:
            yield start - extra, k, *found
        margins = margins[-1:]
    for margin in margins:  # twice this work is still far less than a full SVD
        low, high = max(start - margin, 0), min(start + r + margin, k)
        if high - low <= k // 2:  # else the SVD inside the span costs as much as the full one
            with suppress(scipy.linalg.LinAlgError):  # inverse iteration did not converge
                yield low, high, *dense_eigenpairs(gram(W), low, high), None


def _certified(
    W: Tensor, energy: Tensor, wanted: slice, low: int, high: int, eigenvalues: Tensor, Q: Tensor, L: Tensor | None
) -> SingularSlice | None:
    """Compute the ``wanted`` ones of triplets ``low`` to ``high`` of W (k, n), k ≤ n, or None where in doubt.

    With an orthonormal Q near the left vectors and the SVD QᵀW = X S Vᵀ, U = QX obeys UᵀW = S Vᵀ exactly, so
    that all error sits in E = W V - U S. To first order, column i of it turns triplet i by at most
    ‖Eᵢ‖ max(σ, σᵢ) / |σ² - σᵢ²|, with σ the nearest one outside Q, and changes σᵢ, relatively, by about the
    square of that.

    More eigenvectors than wanted are taken, so that σ lies well away from the σᵢ: it is the condition number
    σ_max / σ at the edge of Q that limits the accuracy then, not so much the far larger one of the weight.
    """
    k = W.shape[0]
    Q = torch.linalg.qr(Q).Q  # inverse iteration leaves clusters orthogonal to fewer digits
    # Products with W take the thin factor as rows: as columns, a transposed W costs up to six times as much.
    V, R = torch.linalg.qr((Q.mT @ W).mT)  # before the SVD, which is far slower on a wide matrix
    X, S, Yh = torch.linalg.svd(R.mT)  # so that QᵀW = X S (Yh Vᵀ)

    noise = k * _EPS * energy  # below it, squared singular values drown in the rounding of the Gram matrix
    if ((S.square() - eigenvalues.flip(0)).abs() > noise).any():
        return None  # a vector of a cluster came twice, and another one is missing

    triplets = SingularSlice(Q @ X[:, wanted], S[wanted], Yh[wanted] @ V.mT)
    U, sigma, Vh = triplets
    E = (Vh @ W.mT).mT - U * sigma
    if L is not None:
        return _certified_smallest(W, L, triplets, E, S[0])
    residual = torch.linalg.vector_norm(E, dim=0)
    rounding = 10 * _EPS * energy.sqrt()  # no SVD in float64 leaves a smaller residual
    for is_edge, edge in ((low > 0, S[0]), (high < k, S[-1])):
        if not is_edge:
            continue
        larger = torch.maximum(edge, sigma)
        gap = ((edge.square() - sigma.square()).abs() - noise).clamp_min(0)
        angle = torch.where(residual <= rounding, 0.0, residual * larger / gap)
        if (larger.square() <= noise).any() or not torch.linalg.vector_norm(angle) <= _MAX_ANGLE:
            return None
    return triplets


def _certified_smallest(W: Tensor, L: Tensor, triplets: SingularSlice, E: Tensor, edge: Tensor) -> SingularSlice | None:
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
    # The square of the correction is what Vh has lost of its orthonormality still.
    if torch.linalg.vector_norm(angle) <= _MAX_ANGLE and torch.linalg.vector_norm(correction) <= 1e-7:
        return SingularSlice(U, sigma, Vh)
    return None
