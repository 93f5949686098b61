"""Distribution of work over ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import torch.distributed as dist

from milora_lightning.utils.errors import InvalidInputError

T = TypeVar("T")


def cost(shape: tuple[int, int]) -> int:
    """Estimate the cost of decomposing (m, n), m ≤ n: m²n for the Gram matrix plus m³ for its eigenvectors.

    >>> cost((2, 4)), cost((4, 2))
    (24, 24)
    """
    return min(shape) ** 2 * (max(shape) + min(shape))


def partition_by_cost(
    shapes: Sequence[tuple[int, int]], world_size: int, numbers: Sequence[int] | None = None
) -> list[int]:
    """Assign each matrix to a rank so that all ranks have about the same amount of work.

    The most expensive matrices come first. Each goes to the rank with the least work so far and, among equals, to the
    one that received work last. That distributes matrices evenly whose estimated costs are equal and whose true costs
    differ a little.

    Args:
        shapes: Shapes of the matrices.
        world_size: Number of ranks.
        numbers: Number of matrices for each entry of ``shapes``, all of which go to one rank; by default one.

    Returns:
        The rank of each matrix.

    >>> partition_by_cost([(4, 4), (8, 8), (4, 4)], 2), partition_by_cost([(4, 8), (8, 4), (4, 8), (8, 4)], 2)
    ([1, 0, 1], [0, 1, 1, 0])
    """
    costs = [cost(shape) * number for shape, number in zip(shapes, numbers or [1] * len(shapes), strict=True)]
    owners, load, turn = [0] * len(costs), [0] * world_size, [0] * world_size
    for number, index in enumerate(sorted(range(len(costs)), key=lambda i: -costs[i]), 1):
        owner = min(range(world_size), key=lambda rank: (load[rank], -turn[rank]))
        owners[index], turn[owner] = owner, number
        load[owner] += costs[index]
    return owners


def schedule_rounds(owners: Sequence[int], costs: Sequence[float]) -> list[list[int]]:
    """Arrange matrices in rounds, after each of which the ranks wait for one another, so as to keep the waits short.

    Args:
        owners: The rank of each matrix.
        costs: The cost of each matrix.

    Returns:
        The indices of the matrices in each round, at most one per rank; the most expensive first.

    >>> schedule_rounds([0, 1, 0, 1, 1], [3, 9, 4, 2, 5])
    [[1, 2], [4, 0], [3]]
    """
    queues: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(owners)), key=lambda i: -costs[i]):
        queues[owners[index]].append(index)
    rounds = zip_longest(*queues.values())
    return [[index for index in batch if index is not None] for batch in rounds]


def raise_on_all_ranks(error: BaseException | None, world_size: int) -> None:
    """Raise an error on all ranks if any rank has one: a rank that continued alone would wait forever.

    Args:
        error: This rank's error, or None.
        world_size: Number of ranks.

    Raises:
        Exception: This rank's error, if it has one.
        ValueError: With the message of another rank's error.
    """
    if world_size > 1:
        messages: list[Any] = [None] * world_size
        dist.all_gather_object(messages, error and f"{type(error).__name__}: {error}")
        if error is None and any(messages):
            raise InvalidInputError(next(message for message in messages if message))
    if error is not None:
        raise error


def in_step(
    batches: Sequence[T], number: int, size: int, track: Callable[[Sequence[int]], Iterable[int]] = iter
) -> Iterator[tuple[T, bool]]:
    """Yield a rank's share of batches, in the same number of steps on all ranks, and whether each batch counts.

    With sharded weights, ranks compute together: a rank that has no batch left runs another rank's, which does not
    count.

    Args:
        batches: All batches, the same on each rank.
        number: The rank's index among those that share the batches.
        size: The number of these ranks.
        track: Wraps the steps, to show progress.

    >>> list(in_step("abc", 1, 2))
    [('b', True), ('c', False)]
    """
    for first in track(range(0, len(batches), size)):
        mine = first + number
        yield batches[min(mine, len(batches) - 1)], mine < len(batches)
