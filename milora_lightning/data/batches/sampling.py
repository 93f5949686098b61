"""Samplers: the order of examples, grouped by length, and each rank's share of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

Indices = np.ndarray[Any, np.dtype[np.int64]]
PAD_INDEX = -1  # stands for no example
MEGABATCH = 50  # at most this many global batches are sorted by length together


@dataclass(frozen=True)
class Position:
    """A position in the order of an epoch, counted in examples over all ranks.

    It is not counted in batches, because a run may resume with another batch size or number of ranks.

    Attributes:
        epoch: Epoch of the order.
        seed: Seed of the order.
        global_batch: Group size of the order: the examples of a batch over all ranks, or of an optimizer step if their
            number is given.
        consumed: Number of examples of the order that have been trained on.
        end: Number of examples after which the epoch ends; None if it covers all data.
        group_by_length: Whether the examples of a batch have similar lengths.
    """

    epoch: int
    seed: int
    global_batch: int
    consumed: int = 0
    end: int | None = None
    group_by_length: bool = True

    def remaining(self, size: int) -> int:
        """Return how many of ``size`` examples are left in the epoch."""
        return max(0, min(size, size if self.end is None else self.end) - self.consumed)


def grouped_order(lengths: Sequence[int] | Indices, seed: int, epoch: int, global_batch: int, shuffle: bool) -> Indices:
    """Order examples so that the examples of a global batch have similar lengths.

    Args:
        lengths: Length of each example.
        seed: Seed of the order.
        epoch: The epoch; each has a different order.
        global_batch: Examples in one batch over all ranks.
        shuffle: Whether to shuffle; otherwise megabatches are cut from the given order.

    Returns:
        Each index once, in the order that :class:`LengthGroupedSampler` describes.
    """
    lengths = np.asarray(lengths)
    generator = np.random.default_rng((seed, epoch))
    size = len(lengths)
    megabatch = global_batch * min(MEGABATCH, max(1, size // global_batch // 4))
    order = generator.permutation(size) if shuffle else np.arange(size)
    for start in range(0, size, megabatch):
        indices = order[start : start + megabatch]
        order[start : start + megabatch] = indices[np.argsort(-lengths[indices], kind="stable")]
    batches = [order[start : start + global_batch] for start in range(0, size, global_batch)]
    if shuffle:
        # An incomplete batch stays last: elsewhere it would shift the boundaries of the batches after it.
        complete = len(batches) - (size % global_batch > 0)
        batches = [batches[i] for i in generator.permutation(complete)] + batches[complete:]
    return np.concatenate(batches)


def training_order(
    lengths: Sequence[int] | Indices,
    seed: int,
    epoch: int,
    global_batch: int,
    shuffle: bool = True,
    group_by_length: bool = True,
) -> Indices:
    """Order examples as :func:`grouped_order` or, if not grouped, uniformly at random.

    Args:
        lengths: Length of each example in tokens.
        seed: Seed of the order.
        epoch: Number of the epoch; each has a different order.
        global_batch: Number of examples in a batch over all ranks.
        shuffle: Whether the order is random.
        group_by_length: Whether examples of similar lengths share a batch.

    >>> [sorted(training_order([3, 1, 2], 0, epoch, 1, group_by_length=False).tolist()) for epoch in (0, 1)]
    [[0, 1, 2], [0, 1, 2]]
    """
    # Sorting is stable: with equal lengths, examples keep the order in which they were drawn.
    return grouped_order(
        lengths if group_by_length else np.zeros(len(lengths), np.int64), seed, epoch, global_batch, shuffle
    )


class LengthGroupedSampler(DistributedSampler[int]):
    """Training order in which the examples of a batch have similar lengths, to keep padding small.

    A random order is cut into megabatches of 50 global batches (batches over all ranks, or ``group`` examples). Each
    megabatch is sorted by length and cut into global batches, which are then shuffled. Megabatches of small data sets
    are smaller, so that the same examples do not share a batch in every epoch. Rank k of N takes every N-th index,
    starting with the k-th: N ranks together see the same batches as one process with N times the batch size. With the
    same ``group``, the order is the same for all numbers of ranks and batch sizes. If the number of examples is not a
    multiple of N, the first examples of the epoch are repeated. The order depends only on seed and epoch.

    Lightning does not replace it, because it is a ``DistributedSampler``, but sets its epoch.

    Args:
        lengths: Length of each example.
        batch_size: Number of examples in a batch of one rank.
        shuffle: Whether to shuffle; otherwise megabatches are cut from the given order.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: Index of this rank.
        group_by_length: Whether to group; otherwise each order is as likely as any other.
        group: Number of examples of similar length, a multiple of the batch over all ranks; None for that batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        group_by_length: bool = True,
        group: int | None = None,
    ) -> None:
        super().__init__(lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.group_by_length = group_by_length
        self.lengths = np.asarray(lengths)
        self.global_batch = batch_size * num_replicas
        self.group = self.global_batch if group is None else group

    def start(self) -> Position:
        """Return where the next iteration begins: at the first example of the current epoch."""
        return Position(self.epoch, self.seed, self.group, group_by_length=self.group_by_length)

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's indices."""
        return self.share(self.start())

    def share(self, start: Position) -> Iterator[int]:
        """Return this rank's share of the rest of an epoch, which may have begun on another number of ranks."""
        order = self.order(start)
        remaining = order[start.consumed : start.end]
        repeated = np.resize(order, -len(remaining) % self.num_replicas)
        return iter(np.concatenate([remaining, repeated])[self.rank :: self.num_replicas].tolist())

    def order(self, start: Position) -> Indices:
        """Return the order of the whole epoch over all ranks."""
        options = start.seed, start.epoch, start.global_batch, self.shuffle, start.group_by_length
        return training_order(self.lengths, *options)


class EvaluationSampler(DistributedSampler[int], SequentialSampler):
    """Each rank's share of a fixed order, with every example exactly once.

    If the number of examples is not a multiple of the number of ranks, the last ranks get the index −1, for which
    :class:`PaddedDataset` returns an empty example. All ranks then run the same number of batches, which sharded
    models need, and no example counts twice.

    Lightning does not replace it with ``overfit_batches``, because it is also a ``SequentialSampler``.

    Args:
        order: The indices for all ranks.
        num_replicas: Number of ranks.
        rank: Index of this rank.

    >>> [list(EvaluationSampler([2, 0, 1], num_replicas=2, rank=rank)) for rank in range(2)]
    [[2, 1], [0, -1]]
    """

    def __init__(self, order: Sequence[int], num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(order, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        self.order = list(order)

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's indices."""
        padding = [PAD_INDEX] * (self.total_size - len(self.order))
        return iter((self.order + padding)[self.rank :: self.num_replicas])


class ResumableDataLoader(DataLoader[Any]):
    """A data loader that asks its sampler for the order only when the first batch is requested.

    Lightning creates the iterator before it sets the epoch and before it knows where a resumed run continues; a plain
    loader with workers would already have fetched the first batches by then.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate over the batches of an epoch."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module keeps the position. The method only tells Lightning that it is kept."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""
