"""Singular triplets of a weight inside a given span (Rayleigh-Ritz)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]
"""U (k, r), S (r,) descending and Vh (r, n)."""


class Ritz(NamedTuple):
    """The SVD of QᵀW for an orthonormal Q (k, p), as QᵀW = X S (Yh Vᵀ) with V (n, p): triplets inside the span of Q."""

    Q: Tensor
    X: Tensor
    S: Tensor
    Yh: Tensor
    V: Tensor

    def triplets(self, wanted: slice) -> Triplets:
        """Return the wanted triplets, for which UᵀW = S Vᵀ holds exactly, but not W V = U S."""
        return self.Q @ self.X[:, wanted], self.S[wanted], self.Yh[wanted] @ self.V.mT


def ritz_triplets(W: Tensor, vectors: Tensor) -> Ritz:
    """Compute the triplets of W (k, n) inside the span of vectors (k, p), which need not be orthonormal.

    >>> ritz_triplets(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3)[:, 1:]).S
    tensor([2., 1.])
    """
    Q = torch.linalg.qr(vectors).Q  # after inverse iteration, vectors of a cluster are less accurately orthogonal
    # The thin factor comes as rows: with columns, the product with a transposed W takes up to six times as long.
    V, R = torch.linalg.qr((Q.mT @ W).mT)  # before the SVD, which is far slower on a wide matrix
    # On the CPU: other devices use Jacobi methods, which are less accurate, and slower at this size.
    X, S, Yh = (x.to(W.device) for x in torch.linalg.svd(R.mT.cpu()))
    return Ritz(Q, X, S, Yh, V)


def residual(W: Tensor, triplets: Triplets) -> Tensor:
    """Compute W V - U S (k, r)."""
    U, sigma, Vh = triplets
    return (Vh @ W.mT).mT - U * sigma
