"""Eigenvectors at one end of a symmetric matrix's spectrum, in float64."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from milora_lightning.linalg.devices import CPU, Way, at_home, has_double, in_best_way
from milora_lightning.linalg.eigen import dense_eigenpairs
from milora_lightning.utils.errors import InvalidInputError


def extreme_eigenpairs(G: Tensor, r: int, end: Literal["largest", "smallest"]) -> tuple[Tensor, Tensor]:
    """Compute r eigenpairs of a symmetric matrix (k, k), on the fastest device.

    Args:
        G: The matrix; it is not modified, and is symmetrized first.
        r: Number of eigenpairs, from 1 to k.
        end: Which: those of the largest eigenvalues (not of the largest magnitudes), or of the smallest.

    Returns:
        Values (r,), descending, and vectors (k, r), on the matrix's device, in float64 if the device supports it.

    Raises:
        ValueError: If r is out of range, or the matrix has NaN or infinite entries.

    >>> extreme_eigenpairs(torch.diag(torch.tensor([4.0, -1.0, 3.0])), 2, "smallest")[0]
    tensor([ 3., -1.], dtype=torch.float64)
    """
    k = len(G)
    if not 1 <= r <= k:
        raise InvalidInputError(f"a matrix of size {k} has {k} eigenvectors, not {r}: set r from 1 to {k}")
    if not G.isfinite().all():
        raise InvalidInputError("a matrix of statistics has NaN or infinite entries")

    def decompose(way: Way) -> tuple[Tensor, Tensor]:
        symmetric = G.to(way.device if has_double(way.device) else CPU).to(torch.float64)
        symmetric = (symmetric + symmetric.mT) / 2
        low = 0 if end == "largest" else k - r
        values, vectors = dense_eigenpairs(symmetric, low, low + r)
        return values.flip(0), vectors.flip(1)

    values, vectors = in_best_way(decompose, G.device, (k, k), r)
    return at_home(values, G.device), at_home(vectors.contiguous(), G.device)
