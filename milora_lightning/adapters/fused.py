"""Fused projections: layers whose rows are several projections below one another, each with factors of its own.

Of parts with n₁, n₂, … rows (query, key and value; gate and up), each is a matrix with its own A (r, in) and B (nᵢ, r).
They are held one below the other, as A (parts · r, in) and B (out, r). The layer's update is that of a layer of rank
parts · r, whose B is block-diagonal: (out, parts · r).
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
    """Return A, B, A₀ and B₀ of the whole layer, from those of its parts, one below the other.

    Args:
        factors: A and A₀ (parts · r, in), B and B₀ (out, r).
        sizes: Rows of each part; none if the factors are those of the layer already.
    """
    A, B, initial_A, initial_B = factors
    if not sizes:
        return factors
    return A, block_diagonal(B, sizes), initial_A, None if initial_B is None else block_diagonal(initial_B, sizes)


def block_diagonal(B: Tensor, sizes: Sequence[int], stacks: int = 1) -> Tensor:
    """Place the rows of each part in columns of their own: (out, n · r) becomes (out, n · parts · r).

    Args:
        B: Factors of the parts, one below the other; possibly a shard of them.
        sizes: Rows of each part.
        stacks: The number n of factors side by side, each of which is spread by itself.

    >>> block_diagonal(torch.tensor([[1.0], [2.0], [3.0]]), (1, 2))
    tensor([[1., 0.],
            [0., 2.],
            [0., 3.]])
    """
    if isinstance(B, DTensor):
        return _of_shards(B, sizes)
    r, last = B.shape[1] // stacks, len(sizes) - 1
    rows = B.view(-1, stacks, r).split_with_sizes(list(sizes))
    return torch.cat([F.pad(own, (i * r, (last - i) * r)) for i, own in enumerate(rows)]).flatten(1)


def diagonal_blocks(wide: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the blocks of a matrix that :func:`block_diagonal` fills: (out, parts · r) becomes (out, r).

    >>> diagonal_blocks(torch.arange(6.0).view(3, 2), (1, 2)).tolist()
    [[0.0], [3.0], [5.0]]
    """
    r, rows = wide.shape[1] // len(sizes), wide.split_with_sizes(list(sizes))
    return torch.cat([own[:, i * r : (i + 1) * r] for i, own in enumerate(rows)])


def _of_shards(B: DTensor, sizes: Sequence[int]) -> Tensor:
    wide = cast(DTensor, torch.cat([B] * len(sizes), dim=1))
    ones = torch.ones(B.shape, dtype=B.dtype, device=B.to_local().device)
    # Each rank makes the whole mask, and keeps its rows.
    own = distribute_tensor(block_diagonal(ones, sizes), wide.device_mesh, wide.placements, src_data_rank=None)
    return wide * own


def by_part(A: Tensor, B: Tensor, sizes: Sequence[int], r: int) -> list[tuple[Tensor, Tensor]]:
    """Return the factors of each part, A (n · r, in) and B (rows, n · r), of n stacks as they are held.

    Args:
        A: n stacks of all parts' A, (n · parts · r, in).
        B: (out, n · r).
        sizes: Rows of each part.
        r: Rank of a part.
    """
    stacks = A.view(-1, len(sizes), r, A.shape[1])
    return [(stacks[:, i].flatten(0, 1), rows) for i, rows in enumerate(B.split_with_sizes(list(sizes)))]
