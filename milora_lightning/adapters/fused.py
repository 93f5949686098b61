"""Fused projections: layers whose weight stacks several projections, each with separate factors.

Each part (query, key and value; gate and up) is a matrix of nᵢ rows with its own A (r, in) and B (nᵢ, r). The layer
stores them stacked along their rows, as A (parts · r, in) and B (out, r). Its update is that of a layer of rank parts ·
r with a block-diagonal B (out, parts · r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from milora_lightning.adapters.factors import Factors


def spread_factors(factors: Factors, sizes: Sequence[int]) -> Factors:
    """Return A, B, A₀ and B₀ of the whole layer, from the stacked ones of its parts.

    Args:
        factors: A and A₀ (parts · r, in), B and B₀ (out, r).
        sizes: Rows of each part; empty if the layer has no parts, and the factors are returned unchanged.
    """
    A, B, initial_A, initial_B = factors
    if not sizes:
        return factors
    return A, block_diagonal(B, sizes), initial_A, None if initial_B is None else block_diagonal(initial_B, sizes)


def block_diagonal(B: Tensor, sizes: Sequence[int], stacks: int = 1) -> Tensor:
    """Move the rows of each part to separate columns: (out, n · r) becomes (out, n · parts · r).

    Args:
        B: Stacked factors of the parts; possibly sharded.
        sizes: Rows of each part.
        stacks: The number n of factors side by side, each of which becomes block-diagonal.

    >>> block_diagonal(torch.tensor([[1.0], [2.0], [3.0]]), (1, 2))
    tensor([[1., 0.],
            [0., 2.],
            [0., 3.]])
    """
    if isinstance(B, DTensor):
        return _of_shards(B, sizes)
    r, last = B.shape[1] // stacks, len(sizes) - 1
    rows = B.view(-1, stacks, r).split_with_sizes(list(sizes))
    return torch.cat([F.pad(block, (i * r, (last - i) * r)) for i, block in enumerate(rows)]).flatten(1)


def diagonal_blocks(wide: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the blocks of a matrix that :func:`block_diagonal` fills: (out, parts · r) becomes (out, r).

    >>> diagonal_blocks(torch.arange(6.0).view(3, 2), (1, 2)).tolist()
    [[0.0], [3.0], [5.0]]
    """
    r, rows = wide.shape[1] // len(sizes), wide.split_with_sizes(list(sizes))
    return torch.cat([block[:, i * r : (i + 1) * r] for i, block in enumerate(rows)])


def _of_shards(B: DTensor, sizes: Sequence[int]) -> Tensor:
    wide = cast(DTensor, torch.cat([B] * len(sizes), dim=1))
    ones = torch.ones(B.shape, dtype=B.dtype, device=B.to_local().device)
    # Each rank creates the whole mask and keeps its rows.
    mask = distribute_tensor(block_diagonal(ones, sizes), wide.device_mesh, wide.placements, src_data_rank=None)
    return wide * mask


def by_part(A: Tensor, B: Tensor, sizes: Sequence[int], r: int) -> list[tuple[Tensor, Tensor]]:
    """Split n stacks of stored factors by part, into A (n · r, in) and B (rows, n · r) for each.

    Args:
        A: n stacks of all parts' A, (n · parts · r, in).
        B: n parts' B side by side, (out, n · r).
        sizes: Rows of each part.
        r: Rank of a part.
    """
    stacks = A.view(-1, len(sizes), r, A.shape[1])
    return [(stacks[:, i].flatten(0, 1), rows) for i, rows in enumerate(B.split_with_sizes(list(sizes)))]
