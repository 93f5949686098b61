"""Batches by a token budget: each has as many examples as fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, SequentialSampler

from milora_lightning.data.batches.batching import round_up
from milora_lightning.data.batches.packing import pack_sorted
from milora_lightning.data.batches.resuming import ResumableSampler, Resumption
from milora_lightning.data.batches.sampling import Indices, Position
from milora_lightning.utils.errors import InvalidInputError


class Batches(Dataset[list[Any]]):
    """The rows of a data set, accessed by lists of indices.

    Args:
        rows: The data set.
    """

    def __init__(self, rows: Any) -> None:
        self.source = rows

    def __getitem__(self, indices: list[int]) -> list[Any]:
        """Return the rows at some indices."""
        return [self.source[index] for index in indices]

    def __len__(self) -> int:
        return len(self.source)


def places_of_batches(sizes: Sequence[int], max_tokens: int, padded: bool) -> list[list[int]]:
    """Divide rows into batches of at most ``max_tokens`` tokens.

    Args:
        sizes: Number of tokens of each row, longest first; at most ``max_tokens`` each.
        max_tokens: Maximum number of tokens in a batch.
        padded: Whether rows are padded to the longest of their batch. Then a batch consists of rows of similar length;
            otherwise of any rows that fill it.

    Returns:
        For each batch the indices of its rows in ``sizes``.

    >>> places_of_batches([5, 3, 2, 2, 1], 6, padded=True), places_of_batches([5, 3, 2, 2, 1], 6, padded=False)
    ([[0], [1, 2], [3, 4]], [[0], [1, 2, 4], [3]])
    """
    if not padded:
        return pack_sorted(sizes, max_tokens)
    batches: list[list[int]] = []
    for place in range(len(sizes)):
        if not batches or (len(batches[-1]) + 1) * sizes[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(place)
    return batches


class TokenBudgetSampler(ResumableSampler):
    """Batches with at most ``max_tokens`` tokens per rank, in a different order in each epoch, with every example once.

    Each epoch has the same number of batches with the same lengths, but examples of equal length are distributed over
    them differently. An epoch can be resumed at its position with any number of ranks, because the position is counted
    in batches, and batches do not depend on the ranks. If their number is not a multiple of the ranks, the last ones
    are split; only if fewer examples than ranks are left, some are repeated.

    Args:
        resumption: Keeps the position to start from.
        lengths: Length of each example.
        max_tokens: Maximum number of tokens in a batch of one rank, padding included.
        padded: Whether examples are padded to the longest of their batch.
        multiple: Lengths are rounded up to a multiple of this.
        options: As for :class:`LengthGroupedSampler`.

    Raises:
        ValueError: If an example is longer than a batch.
    """

    def __init__(
        self,
        resumption: Resumption,
        lengths: Sequence[int],
        max_tokens: int,
        padded: bool = True,
        multiple: int = 1,
        **options: Any,
    ) -> None:
        self.sizes = -(-np.asarray(lengths) // multiple) * multiple
        if max_tokens < (longest := int(self.sizes.max())):
            raise InvalidInputError(
                f"max_tokens_per_batch={max_tokens} is less than the longest row of the training data, {longest} "
                f"tokens: set it to {longest} at least, or lower max_length."
            )
        descending = -np.sort(-self.sizes)
        self.places = places_of_batches(descending.tolist(), max_tokens, padded)
        of_batches = [descending[batch] for batch in self.places]
        tokens = [int(len(sizes) * sizes.max() if padded else sizes.sum()) for sizes in of_batches]
        super().__init__(resumption, tokens, 1, **options)

    def order(self, start: Position) -> Indices:
        """Return the order of the batches of the whole epoch over all ranks."""
        order = super().order(start)
        ranks = start.global_batch
        if ranks > 1 and len(order) % ranks:
            # The batches to be split at the end have an example for each rank.
            counts = np.asarray([len(self.places[index]) for index in order])
            enough = np.flatnonzero(counts >= min(ranks, counts.max()))
            chosen = np.random.default_rng((start.seed, start.epoch, 2)).choice(enough)
            order[[chosen, -1]] = order[[-1, chosen]]
        return order

    def share(self, start: Position) -> Iterator[Any]:
        """Return this rank's share of the batches in the rest of an epoch: the indices of each batch."""
        batches = self._batches(start)
        whole = len(batches) - len(batches) % self.num_replicas
        last = _divided(batches[whole:], self.num_replicas)
        return iter([*batches[:whole], *last][self.rank :: self.num_replicas])

    def _batches(self, start: Position) -> list[list[int]]:
        generator = np.random.default_rng((start.seed, start.epoch, 1))
        examples: Indices = generator.permutation(len(self.sizes))
        examples = examples[np.argsort(-self.sizes[examples], kind="stable")]
        rest = self.order(start)[start.consumed : start.end]
        return [examples[self.places[index]].tolist() for index in rest]


class OverfittingBudgetSampler(TokenBudgetSampler, SequentialSampler):
    """The same batches in each epoch, longest first: with ``overfit_batches``, Lightning takes the first of them."""

    def order(self, start: Position) -> Indices:
        """Return the given order."""
        return np.arange(len(self.lengths))

    def _batches(self, start: Position) -> list[list[int]]:
        return super()._batches(replace(start, epoch=0))


def _divided(batches: list[list[int]], number: int) -> list[list[int]]:
    """Split batches until there are ``number`` of them, unless there are none; a batch of one example is repeated.

    >>> _divided([[1, 2, 3], [4]], 3), _divided([[4]], 2)
    ([[4], [1, 2], [3]], [[4], [4]])
    """
    divided = [*batches]
    while divided and len(divided) < number:
        divided.sort(key=len)
        most = divided.pop()
        if len(most) == 1:
            return [*divided, most, *([most] * (number - len(divided) - 1))]
        half = round_up(len(most), 2) // 2
        divided += [most[:half], most[half:]]
    return divided
