"""Singular values of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from milora_lightning.linalg.devices import has_double


def in_double(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64, on its device or, if that has no float64 (mps), on the CPU."""
    return (tensor if has_double(tensor.device) else tensor.cpu()).double()


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SVD of a product B A in float64 without forming it.

    Args:
        B: Factor of shape (out, n).
        A: Factor of shape (n, in).

    Returns:
        U (out, m), S (m,) descending and Vh (m, in), for m = min(n, out, in): on the factors' device, or on the CPU if
        that has no float64.

    >>> product_svd(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0, 0.0, 0.0]]))[1]
    tensor([6.], dtype=torch.float64)
    """
    Q_B, R_B = torch.linalg.qr(in_double(B))
    Q_A, R_A = torch.linalg.qr(in_double(A).mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT
