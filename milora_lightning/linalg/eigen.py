"""Selected eigenpairs of a Gram matrix: the smallest by a Krylov method, any others by LAPACK."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.linalg import LinAlgError as ScipysError
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # offered, but not listed

from milora_lightning.linalg.lapack import symmetric_eigenpairs

NOT_CONVERGED = (ScipysError, LinAlgError)
"""Errors of an iteration that does not converge, on the CPU and elsewhere; torch's is a ``RuntimeError``."""

_ONE_THREAD = 1536  # up to this size, scipy's threads lose more time waiting for torch's than they gain
_scipy_threads = ThreadpoolController()
_STEPS = 8  # before a restart: orthogonalization and the projected problem stay cheap
_CYCLES = 4
_ANGLE, _OUTER_ANGLE = 1e-9, 1e-5  # angles to the exact subspace: of the wanted vectors, and of the margin


def gram(W: Tensor) -> Tensor:
    """Compute W Wᵀ (k, k) of W (k, n).

    >>> W = torch.randn(20, 30, dtype=torch.float64)
    >>> torch.allclose(gram(W), W @ W.mT)
    True
    """
    if not _on_cpu(W):
        return W @ W.mT
    rows = W.numpy()
    return torch.from_numpy(rows @ rows.T)  # unlike torch, numpy detects the symmetry and computes only half


def dense_eigenpairs(G: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Compute eigenpairs ``low`` to ``high``, counted from the largest, of a symmetric G (k, k), which is overwritten.

    Returns:
        Values (high - low,), ascending, and vectors (k, high - low).

    Raises:
        LinAlgError: scipy's or torch's, if the solver does not converge.

    >>> dense_eigenpairs(torch.diag(torch.tensor([4.0, 1.0, 2.0, 3.0], dtype=torch.float64)), 1, 3)[0]
    tensor([2., 3.], dtype=torch.float64)
    """
    k = G.shape[0]
    if not _on_cpu(G):
        values, vectors = eigenpairs(G)
        return values[k - high : k - low], vectors[:, k - high : k - low]
    with _scipy_threads.limit(limits=1 if k <= _ONE_THREAD else None, user_api="blas"):
        return symmetric_eigenpairs(G, k - high, k - low)


def eigenpairs(G: Tensor) -> tuple[Tensor, Tensor]:
    """Compute all eigenpairs of a symmetric G (k, k) with torch, values ascending.

    Raises:
        torch.linalg.LinAlgError: If the solver does not converge, or returns NaN or infinity, as cuSOLVER has done.
    """
    values, vectors = torch.linalg.eigh(G)
    if not values.isfinite().all():
        raise LinAlgError(f"eigh returned NaN for a finite matrix of size {len(G)}.")
    return values, vectors


def _on_cpu(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu"


def smallest_eigenpairs(W: Tensor, wanted: int, margin: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute the ``wanted`` smallest eigenpairs of W Wᵀ (k, k), and ``margin`` more, less accurately.

    Block Krylov iteration with (W Wᵀ)⁻¹, full orthogonalization and restarts: the cost is in matrix products,
    triangular solves and one Cholesky factorization. The starting block is random, so that no eigenvector is missed,
    and wider than the result, so that no multiple eigenvalue is missed: with more equal eigenvalues than columns there
    is no gap to the unwanted ones, and the iteration never converges.

    Returns:
        Values (wanted + margin,), ascending, vectors (k, wanted + margin), not normalized, and the Cholesky factor of W
        Wᵀ; None if W is numerically singular or the iteration does not converge.

    >>> values, vectors, L = smallest_eigenpairs(torch.arange(1.0, 101).double().diag(), wanted=2, margin=4)
    >>> values[:2]
    tensor([1.0000, 4.0000], dtype=torch.float64)
    """
    k, width, keep = W.shape[0], wanted + 2 * margin, wanted + margin
    L, info = torch.linalg.cholesky_ex(gram(W))
    if info:
        return None

    def inverse(X: Tensor) -> Tensor:
        Y = torch.linalg.solve_triangular(L, X, upper=False)
        Z: Tensor = torch.linalg.solve_triangular(L.mT, Y, upper=True)
        return Z

    X = torch.randn(k, width, dtype=W.dtype, generator=torch.Generator().manual_seed(0), device="cpu").to(W.device)
    for _ in range(_CYCLES):
        mu, X, angles = _krylov_cycle(inverse, X, min(_STEPS, k // width), wanted)
        if angles[:wanted].norm() < _ANGLE and angles[:keep].max() < _OUTER_ANGLE:
            # Applied once more to damp the directions that dominate a residual: those far from this end of the
            # spectrum.
            return 1 / mu[:keep], inverse(X[:, :keep]), L
    return None


def _krylov_cycle(
    operator: Callable[[Tensor], Tensor], X: Tensor, steps: int, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the largest Ritz pairs in the span of X, M X, M² X, ... for a symmetric positive operator M.

    Returns:
        Ritz values (width,) descending, vectors (k, width), and an estimate, from the residual, of each vector's angle
        to the exact subspace.
    """
    k, width = X.shape
    basis = X.new_empty(steps * width, k)  # orthonormal rows, so that those computed so far are contiguous
    basis[:width] = torch.linalg.qr(X).Q.mT
    H = X.new_zeros(steps * width, steps * width)  # the operator's projection, upper triangle
    for step in range(steps):
        block, stop = slice(step * width, (step + 1) * width), (step + 1) * width
        span = basis[:stop]
        Y = operator(span[block].mT)
        H[:stop, block] = span @ Y
        Y -= span.mT @ H[:stop, block]
        if step > 4 or step == steps - 1:
            mu, y = torch.linalg.eigh(H[:stop, :stop], UPLO="U")
            mu, y = mu[-width:].flip(0), y[:, -width:].flip(1)
            angles = torch.linalg.vector_norm(Y @ y[block], dim=0) / (mu - mu[-1])
            if angles[:wanted].norm() < _ANGLE:
                break
        if step < steps - 1:
            Q = torch.linalg.qr(Y).Q
            Q -= span.mT @ (span @ Q)  # second pass, against the rounding error of the first
            basis[stop : stop + width] = torch.linalg.qr(Q).Q.mT
    return mu, span.mT @ y, angles
