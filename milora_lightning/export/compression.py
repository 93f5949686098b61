"""Compressing factors to a lower rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from milora_lightning.linalg.products import product_svd
from milora_lightning.utils.errors import InvalidInputError


@torch.no_grad()
def compress(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Compute the best factors of a lower rank by the SVD of B A, without forming the product.

    Args:
        B: Factor of shape (out, k).
        A: Factor of shape (k, in).
        rank: Rank to keep; at most k.

    Returns:
        A (rank, in) and B (out, rank), each scaled by the square roots of the singular values; the energy ‖·‖²_F that
        is lost; the energy of B A.

    Raises:
        ValueError: If ``rank`` exceeds k.

    >>> B, A = torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2)
    >>> A1, B1, lost, energy = compress(B, A, 1)
    >>> (B1 @ A1).round(), lost / energy
    (tensor([[2., 0.],
            [0., 0.]]), 0.2)
    """
    if rank > A.shape[0]:
        raise InvalidInputError(
            f"rank={rank} is more than the adapters' {A.shape[0]}; leave it out to keep everything."
        )
    U, S, Vh = product_svd(B, A)
    root = S[:rank].sqrt()
    lost, energy = S[rank:].square().sum().item(), S.square().sum().item()
    small_A, small_B = root[:, None] * Vh[:rank], U[:, :rank] * root
    padding = rank - small_A.shape[0]  # a small matrix may have fewer singular values than rank
    small_A, small_B = F.pad(small_A, (0, 0, 0, padding)), F.pad(small_B, (0, padding))
    return small_A.to(A.dtype).to(A.device), small_B.to(B.dtype).to(B.device), lost, energy
