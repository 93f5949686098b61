"""Which examples make a batch, in which order, and on which rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

Indices = np.ndarray[Any, np.dtype[np.int64]]
FILLER = -1  # the index that stands for no example
PIECE = 50  # most global batches whose examples are sorted together


@dataclass(frozen=True)
class Position:
    """A place in the order of an epoch, counted in examples of all ranks together.

    Batches would not do: a run may go on with another batch size or on another number of ranks.

    Attributes:
        epoch: Epoch of the order.
        seed: Seed of the order.
        global_batch: Examples of one batch of all ranks, by which the order is grouped.
        consumed: How many examples of the order have been trained on.
        end: At how many the epoch ends; None where all data are trained on.
    """

    epoch: int
    seed: int
    global_batch: int
    consumed: int = 0
    end: int | None = None

    def remaining(self, size: int) -> int:
        """Return how many of ``size`` examples the epoch still has to train on."""
        return max(0, min(size, size if self.end is None else self.end) - self.consumed)


def grouped_order(lengths: Sequence[int] | Indices, seed: int, epoch: int, global_batch: int, shuffle: bool) -> Indices:
    """Order examples so that those of a global batch are about equally long.

    Args:
        lengths: Length of each example.
        seed: Seed of the order.
        epoch: The epoch; each has another order.
        global_batch: Examples of one batch of all ranks.
        shuffle: Whether to shuffle; otherwise the pieces that are sorted come from the given order.

    Returns:
        Each index once, as :class:`LengthGroupedSampler` describes it.
    """
    lengths = np.asarray(lengths)
    generator = np.random.default_rng((seed, epoch))
    size = len(lengths)
    piece = global_batch * min(PIECE, max(1, size // global_batch // 4))
    order = generator.permutation(size) if shuffle else np.arange(size)
    for start in range(0, size, piece):
        indices = order[start : start + piece]
        order[start : start + piece] = indices[np.argsort(-lengths[indices], kind="stable")]
    batches = [order[start : start + global_batch] for start in range(0, size, global_batch)]
    if shuffle:
        # An incomplete batch stays last: elsewhere it would shift the borders of those after it.
        complete = len(batches) - (size % global_batch > 0)
        batches = [batches[i] for i in generator.permutation(complete)] + batches[complete:]
    return np.concatenate(batches)


class LengthGroupedSampler(DistributedSampler[int]):
    """Training order in which the examples of a batch are about equally long, so that little is padding.

    A random order is cut into pieces of 50 global batches (those of all ranks together; fewer where the data is
    small, lest the same examples met each epoch), each piece is sorted by length and cut into global batches, and
    these are shuffled. Rank k takes every N-th index from the k-th on, so
    that N ranks together see the very batches that one process with N times the batch size sees. If the examples do
    not share out evenly among the ranks, the first ones of the epoch are repeated. The order is a function of seed
    and epoch alone.

    Being a ``DistributedSampler``, it is left alone by Lightning, which sets its epoch.

    Args:
        lengths: Length of each example.
        batch_size: Number of examples in the batch of one rank.
        shuffle: Whether to shuffle; otherwise the pieces come from the given order.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: This one.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.lengths = np.asarray(lengths)
        self.global_batch = batch_size * num_replicas

    def start(self) -> Position:
        """Return where the next iteration begins: with the first example of the epoch that was set."""
        return Position(self.epoch, self.seed, self.global_batch)

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's indices."""
        return self.share(self.start())

    def share(self, start: Position) -> Iterator[int]:
        """Return this rank's share of what is left of an epoch, also of one that another number of ranks began."""
        order = self.order(start)
        left = order[start.consumed : start.end]
        repeated = np.resize(order, -len(left) % self.num_replicas)
        return iter(np.concatenate([left, repeated])[self.rank :: self.num_replicas].tolist())

    def order(self, start: Position) -> Indices:
        """Return the order of the whole epoch, of all ranks."""
        return grouped_order(self.lengths, start.seed, start.epoch, start.global_batch, self.shuffle)


class EvaluationSampler(DistributedSampler[int], SequentialSampler):
    """Each rank's share of a fixed order, with every example exactly once.

    If the examples do not share out evenly, the last ranks get the index −1, for which :class:`FilledDataset` has an
    example that counts nothing: all ranks run equally many batches, as sharded models need it, and no example is
    counted twice.

    Being a ``SequentialSampler`` as well, it is left alone by Lightning where batches are overfitted.

    Args:
        order: The indices of all ranks.
        num_replicas: Number of ranks.
        rank: This one.

    >>> [list(EvaluationSampler([2, 0, 1], num_replicas=2, rank=rank)) for rank in range(2)]
    [[2, 1], [0, -1]]
    """

    def __init__(self, order: Sequence[int], num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(order, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        self.order = list(order)

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's indices."""
        fillers = [FILLER] * (self.total_size - len(self.order))
        return iter((self.order + fillers)[self.rank :: self.num_replicas])


class ResumableDataLoader(DataLoader[Any]):
    """A data loader that asks its sampler for the order no sooner than its first batch is asked for.

    Lightning makes the iterator before it sets the epoch and before it knows where a resumed run goes on; with
    workers, a plain loader would have fetched the first batches by then.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate over the batches of an epoch."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module keeps the place. That there is a method tells Lightning that it is kept."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""
