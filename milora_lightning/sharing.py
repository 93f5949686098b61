"""Sharing the decompositions out among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from milora_lightning.lora import LoRALinear


def share_out(shapes: Sequence[tuple[int, int]], world_size: int) -> list[int]:
    """Give each matrix to a rank, so that the ranks have about equally much to do.

    The costliest come first, each to the rank that has least so far; the cost of decomposing (m, n), m ≤ n, is
    taken as m²n for the Gram matrix plus m³ for its eigenvectors.

    Args:
        shapes: Shapes of the matrices.
        world_size: Number of ranks.

    Returns:
        The rank of each matrix.

    >>> share_out([(4, 4), (8, 8), (4, 4)], 2)
    [1, 0, 1]
    """
    costs = [min(shape) ** 2 * (max(shape) + min(shape)) for shape in shapes]
    owners, load = [0] * len(costs), [0] * world_size
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners


def broadcast_factors(layers: Sequence[LoRALinear], owners: Sequence[int]) -> None:
    """Send the factors of each layer from the rank that has computed them to all others."""
    for layer, owner in zip(layers, owners, strict=True):
        factors = [factor.detach().clone() for factor in (layer.lora_A, layer.lora_B)]
        for factor in factors:
            dist.broadcast(factor, src=owner)
        layer.set_initial_factors(*factors)


def raise_together(error: Exception | None, world_size: int) -> None:
    """Raise what this rank has met, or else what another one has; a rank that went on would wait for ever.

    Raises:
        Exception: This rank's.
        ValueError: With the message of another rank's.
    """
    if world_size > 1:
        messages: list[Any] = [None] * world_size
        dist.all_gather_object(messages, error and f"{type(error).__name__}: {error}")
        if error is None and any(messages):
            raise ValueError(next(message for message in messages if message))
    if error is not None:
        raise error
