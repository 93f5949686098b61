"""Training batches of a stream, read in blocks that are each ordered like a small data set.

Worker k of N takes every N-th record, starting with the k-th. It encodes a block of its records, groups it by length
(or packs it, or neither) and shuffles it; examples that do not fill a group, a batch over all ranks or an optimizer
step, are carried over into its next block. All ranks go through the same batches and take their share of each, as with
other data. The place in the stream is therefore the same on all ranks, and a run can resume on any number of them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from milora_lightning.data.batches.batching import Example
from milora_lightning.data.batches.packing import pack
from milora_lightning.data.batches.sampling import training_order
from milora_lightning.data.streaming.places import Place, StreamPlaces
from milora_lightning.data.streaming.rows import Stream
from milora_lightning.utils.compat.torch import forget_worker
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError

GOLDEN = 0.6180339887498949  # the fractional parts of its multiples are spread evenly
Group = list[tuple[Any, Place | int]]  # batches, each with the place after it or the rows consumed in the same block
Encode = Callable[[Sequence[dict[str, Any]], Sequence[int]], list[Example]]


@dataclass(frozen=True)
class Failure:
    """An error in the data, passed on from a worker as a value, because an exception would carry its traceback."""

    message: str


class StreamedBatches(IterableDataset[Any]):
    """The endless batches of one rank: a stream that ends is read again.

    Args:
        stream: The stream.
        encode: Encodes rows, given with their indices in the stream.
        collate: Collates rows to a batch.
        buffer: Number of records in the blocks of all workers together.
        batch_size: Rows in a batch of one rank.
        capacity: Maximum number of tokens in a packed row; None for one example per row.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: Index of this rank.
        group_by_length: Whether the rows of a batch have similar lengths.
        group: Rows of an optimizer step, a multiple of the batch over all ranks, which then come from one worker; None
            for that batch.
    """

    def __init__(
        self,
        stream: Stream,
        encode: Encode,
        collate: Callable[[Any], Any],
        buffer: int,
        batch_size: int,
        capacity: int | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        group_by_length: bool = True,
        group: int | None = None,
    ) -> None:
        self.group_by_length = group_by_length
        self.stream = stream
        self.encode = encode
        self.collate = collate
        self.buffer = buffer
        self.global_batch = batch_size * num_replicas
        self.group = self.global_batch if group is None else group
        self.capacity = capacity
        self.seed = seed
        self.share = slice(rank, None, num_replicas)
        self.places: tuple[Place, ...] = (Place(0),)  # of all workers, beginning with the one whose batch is next

    def __iter__(self) -> Iterator[Group | Failure]:
        """Iterate over groups of batches."""
        worker = get_worker_info()
        # The stream is divided here: without this, `datasets` would divide it among the workers a second time.
        forget_worker()
        try:
            yield from self.batches(self.places[worker.id if worker else 0])
        except MiLoRAError as error:
            yield Failure(str(error))
        except OSError as error:
            yield Failure(
                f"The training stream cannot be read ({type(error).__name__}: {error}). Check file and network, and "
                "resume from the last checkpoint."
            )

    def batches(self, place: Place) -> Iterator[Group]:
        """Iterate over groups of batches, starting at a place.

        Each batch comes with the place after it, or with the rows consumed if nothing else has changed.
        """
        for start, rows in self._blocks(place):
            order = self._order(start, rows)
            for begin in range(start.consumed, len(rows) - self.group + 1, self.group):
                group: Group = []
                for consumed in range(begin + self.global_batch, begin + self.group + 1, self.global_batch):
                    chosen = order[consumed - self.global_batch : consumed][self.share]
                    first = begin == start.consumed and not group
                    mark = replace(start, consumed=consumed) if first else consumed
                    group.append((self.collate([rows[i] for i in chosen]), mark))
                yield group

    def _blocks(self, place: Place) -> Iterator[tuple[Place, list[Any]]]:
        """Yield the place of each block, with its digest and rows."""
        workers = len(self.places)
        while True:
            found = place.record > 0
            records = enumerate(self.stream.skip(place.record), place.record)
            mine = itertools.islice(records, (place.worker - place.record) % workers, None, workers)
            while block := list(itertools.islice(mine, self._size(place))):
                indices, values = zip(*block, strict=True)
                examples = self.encode(values, indices)
                found = found or bool(examples)
                place = self._known(place, [*place.carried, *examples])
                rows = self._rows([*place.carried, *examples], place)
                yield place, rows
                left = self._order(place, rows)[len(rows) - (len(rows) - place.consumed) % self.group :]
                carried = tuple(example for i in left for example in self._examples(rows[i]))
                place = Place(place.worker, place.epoch, indices[-1] + 1, place.block + 1, carried)
            if not found:
                raise InvalidInputError(
                    "No example of the training stream has a response to learn from. Check which field holds the "
                    "response, and that there are at least as many rows as data.num_workers."
                )
            place = replace(place, epoch=place.epoch + 1, record=0)

    def _size(self, place: Place) -> int:
        """Return the size of a block: the first of an epoch is smaller, so that blocks differ between epochs."""
        share = (place.epoch * GOLDEN) % 1 if place.record == 0 and place.epoch else 1
        return max(1, int(share * self.buffer / len(self.places)))

    def _known(self, place: Place, examples: list[Example]) -> Place:
        """Set the digest of a block's place, or check it against that of the checkpoint."""
        lengths = np.asarray([len(example["input_ids"]) for example in examples], dtype=np.int64)
        digest = hashlib.sha256(lengths.tobytes()).hexdigest()[:16]
        if place.digest not in ("", digest):
            raise InvalidInputError(
                f"From row {place.record + 1} on, the training stream holds other examples, or of other lengths, "
                "than when the checkpoint was written, so the run cannot resume there. Use the data, the tokenizer and "
                "max_length of that run, or start again."
            )
        return replace(place, digest=digest, global_batch=place.global_batch or self.group)

    def _rows(self, examples: list[Example], place: Place) -> list[Any]:
        if self.capacity is None:
            return examples
        lengths = [len(example["input_ids"]) for example in examples]
        return [[examples[i] for i in row] for row in pack(lengths, self.capacity, self._seed(place))]

    def _order(self, place: Place, rows: list[Any]) -> Any:
        lengths = [sum(len(example["input_ids"]) for example in self._examples(row)) for row in rows]
        if not rows:
            return []
        seeds = self.seed, self._seed(place)
        return training_order(lengths, *seeds, place.global_batch, group_by_length=self.group_by_length)

    def _examples(self, row: Any) -> list[Example]:
        return [row] if self.capacity is None else row

    def _seed(self, place: Place) -> int:
        return place.block * len(self.places) + place.worker


class StreamLoader:
    """Loader of as many batches of a stream as a run needs.

    Args:
        batches: The batches.
        places: Keeps the place in the stream.
        num_workers: Number of worker processes.
        length: Number of batches; they form a single epoch for Lightning.
    """

    def __init__(self, batches: StreamedBatches, places: StreamPlaces, num_workers: int, length: int) -> None:
        self.batches = batches  # not named dataset: Lightning would not trust the length of an iterable dataset
        self.places = places
        self.num_workers = num_workers
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        """Iterate over batches; only when the first one is requested, Lightning knows where a resumed run continues."""
        self.batches.places = self.places.begin()
        loader: DataLoader[Any] = DataLoader(
            self.batches,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # a separate one: the global one is used by training's dropout
        )
        with _without_tokenizer_threads():
            groups = iter(loader)
        for batch, mark, is_last in itertools.islice(_ungrouped(groups), self.length):
            self.places.note(mark, is_last)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module keeps the place. The method only tells Lightning that it is kept."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


@contextmanager
def _without_tokenizer_threads() -> Iterator[None]:
    """Make processes started here tokenize without threads, which do not survive a fork and would cause a warning."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = before or "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]


def _ungrouped(groups: Iterator[Group | Failure]) -> Iterator[tuple[Any, Place | int, bool]]:
    """Yield each batch with its mark, and whether it is the last of its group, after which another worker is next."""
    for group in groups:
        if isinstance(group, Failure):
            raise InvalidInputError(group.message)
        for number, (batch, mark) in enumerate(group, 1):
            yield batch, mark, number == len(group)


def _identity(item: Any) -> Any:
    return item
