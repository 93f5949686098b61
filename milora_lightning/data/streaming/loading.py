"""Training batches of a stream, which is read in blocks that are ordered as small data sets are.

Each DataLoader worker takes every so-many-th record, so that no two encode the same. It encodes a block of its records,
groups it by length (or packs it) and shuffles it, and what does not fill a batch of all ranks goes over into its next
block. All ranks go through the same batches and take their shares of each, as with other data; so the place in a
stream is the same for all of them, and a checkpoint of one serves any number.
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
from milora_lightning.data.batches.sampling import grouped_order
from milora_lightning.data.streaming.places import Place, StreamPlaces
from milora_lightning.data.streaming.rows import Stream
from milora_lightning.utils.compat import forget_worker
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError

GOLDEN = 0.6180339887498949  # whose multiples, but for their whole part, spread evenly
Encode = Callable[[Sequence[dict[str, Any]], Sequence[int]], list[Example]]


@dataclass(frozen=True)
class Failure:
    """What is wrong with the data, on its way from a worker, which would add its traceback to an exception."""

    message: str


class StreamedBatches(IterableDataset[Any]):
    """The batches of one rank, without end: the stream is read again when it has ended.

    Args:
        stream: The stream.
        encode: Makes examples of rows, given with their places in the stream.
        collate: Makes a batch of rows.
        buffer: How many records are in the workers' blocks, together.
        batch_size: Rows in a batch of one rank.
        capacity: Most tokens of a row that examples are packed into; None for an example a row.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: This one.
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
    ) -> None:
        self.stream = stream
        self.encode = encode
        self.collate = collate
        self.buffer = buffer
        self.global_batch = batch_size * num_replicas
        self.capacity = capacity
        self.seed = seed
        self.share = slice(rank, None, num_replicas)
        self.places: tuple[Place, ...] = (Place(0),)  # of each worker, those first whose batch is next

    def __iter__(self) -> Iterator[tuple[Any, Place | int] | Failure]:
        """Iterate over batches, each with the place behind it, or where no more of that has changed, how many rows."""
        worker = get_worker_info()
        # The stream is divided here: a data set of `datasets` would divide itself once more, by what torch tells it.
        forget_worker()
        try:
            yield from self.batches(self.places[worker.id if worker else 0])
        except MiLoRAError as error:
            yield Failure(str(error))
        except OSError as error:
            yield Failure(
                f"The training stream cannot be read ({type(error).__name__}: {error}). Check file and network, and go "
                "on from the last checkpoint."
            )

    def batches(self, place: Place) -> Iterator[tuple[Any, Place | int]]:
        """Iterate over batches from a place on."""
        for start, rows in self._blocks(place):
            order = self._order(start, rows)
            first = True
            for consumed in range(start.consumed + self.global_batch, len(rows) + 1, self.global_batch):
                chosen = order[consumed - self.global_batch : consumed][self.share]
                yield self.collate([rows[i] for i in chosen]), replace(start, consumed=consumed) if first else consumed
                first = False

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
                left = self._order(place, rows)[len(rows) - (len(rows) - place.consumed) % self.global_batch :]
                carried = tuple(example for i in left for example in self._examples(rows[i]))
                place = Place(place.worker, place.epoch, indices[-1] + 1, place.block + 1, carried)
            if not found:
                raise InvalidInputError(
                    "No example of the training stream has a response to learn from. Check which field holds the "
                    "response, and that there are at least as many rows as data.num_workers."
                )
            place = replace(place, epoch=place.epoch + 1, record=0)

    def _size(self, place: Place) -> int:
        """Return how many records a block has: the first of an epoch fewer, so that the same ones meet others."""
        share = (place.epoch * GOLDEN) % 1 if place.record == 0 and place.epoch else 1
        return max(1, int(share * self.buffer / len(self.places)))

    def _known(self, place: Place, examples: list[Example]) -> Place:
        """Give a block's place its digest, or compare it with that of the checkpoint."""
        lengths = np.asarray([len(example["input_ids"]) for example in examples], dtype=np.int64)
        digest = hashlib.sha256(lengths.tobytes()).hexdigest()[:16]
        if place.digest not in ("", digest):
            raise InvalidInputError(
                f"From row {place.record + 1} on, the training stream holds other examples, or of other lengths in "
                "tokens, than when the checkpoint was written: it cannot go on there. Give the data, the tokenizer and "
                "max_length of that run, or begin anew."
            )
        return replace(place, digest=digest, global_batch=place.global_batch or self.global_batch)

    def _rows(self, examples: list[Example], place: Place) -> list[Any]:
        if self.capacity is None:
            return examples
        lengths = [len(example["input_ids"]) for example in examples]
        return [[examples[i] for i in row] for row in pack(lengths, self.capacity, self._seed(place))]

    def _order(self, place: Place, rows: list[Any]) -> Any:
        lengths = [sum(len(example["input_ids"]) for example in self._examples(row)) for row in rows]
        return grouped_order(lengths, self.seed, self._seed(place), place.global_batch, shuffle=True) if rows else []

    def _examples(self, row: Any) -> list[Example]:
        return [row] if self.capacity is None else row

    def _seed(self, place: Place) -> int:
        return place.block * len(self.places) + place.worker


class StreamLoader:
    """Batches of a stream, as many as a run takes.

    Args:
        batches: The batches.
        places: Keeps the place in the stream.
        num_workers: Number of processes.
        length: Number of batches; an epoch of Lightning's has as many.
    """

    def __init__(self, batches: StreamedBatches, places: StreamPlaces, num_workers: int, length: int) -> None:
        self.batches = batches  # not called dataset, by which Lightning would doubt the length
        self.places = places
        self.num_workers = num_workers
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        """Iterate over batches; only when the first is asked for, Lightning knows where a resumed run goes on."""
        self.batches.places = self.places.begin()
        loader: DataLoader[Any] = DataLoader(
            self.batches,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: it must not draw from the one that training's dropout uses
        )
        with _tokenizers_alone():
            batches = iter(loader)
        for item in itertools.islice(batches, self.length):
            if isinstance(item, Failure):
                raise InvalidInputError(item.message)
            batch, mark = item
            self.places.note(mark)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module keeps the place. That there is a method tells Lightning that it is kept."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


@contextmanager
def _tokenizers_alone() -> Iterator[None]:
    """Have processes that begin here tokenize without threads, which do not survive a fork and would be warned of."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = before or "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]


def _as_it_is(item: Any) -> Any:
    return item
