"""Packing of several examples into one row, kept apart in attention by positions that restart at 0."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from milora_lightning.config import IGNORE_INDEX
from milora_lightning.data.batches.batching import Example, learned_spans, round_up


def pack(lengths: Sequence[int], capacity: int, seed: int = 0) -> list[list[int]]:
    """Pack examples into rows by best-fit decreasing: longest first, each into the fullest row with room for it.

    Args:
        lengths: Length of each example, at most ``capacity``.
        capacity: Maximum number of tokens in a row.
        seed: Seed of the order among examples of equal length.

    Returns:
        For each row, the indices of its examples in random order; every example is in exactly one row.

    >>> [sorted(row) for row in pack([5, 3, 2, 4, 1], 6)]
    [[0, 4], [2, 3], [1]]
    """
    sizes = np.asarray(lengths)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    rows: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # rows by the number of tokens that still fit
    rooms: list[int] = []  # the keys that have rows, in ascending order
    for index in order.tolist():
        size = int(sizes[index])
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        rows[row].append(index)
        room -= size
        if not with_room[room]:
            insort(rooms, room)
        with_room[room].append(row)
    return [generator.permutation(row).tolist() for row in rows]


class PackedDataset(Dataset[list[Example]]):
    """Packed rows of tokenized examples. The rows are the same in each epoch; only their order changes.

    Args:
        examples: A dataset with the columns ``input_ids`` and ``spans``.
        lengths: Length of each example.
        capacity: Maximum number of tokens in a row.
        seed: See :func:`pack`.
    """

    def __init__(self, examples: Any, lengths: Sequence[int], capacity: int, seed: int = 0) -> None:
        self.examples = examples
        self.rows = pack(lengths, capacity, seed)
        self.lengths = [sum(lengths[i] for i in row) for row in self.rows]

    def __getitem__(self, index: int) -> list[Example]:
        """Return the examples of a row."""
        columns = self.examples[self.rows[index]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def __len__(self) -> int:
        return len(self.rows)


class PackingCollator:
    """Makes training batches of packed rows.

    There is no attention mask: with one, models of transformers would treat a row as a single example.

    Args:
        pad_token_id: Id of the padding token.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.

    >>> row = [{"input_ids": [5, 6, 7], "spans": [0, 3]}, {"input_ids": [8, 9], "spans": [1, 2]}]
    >>> batch = PackingCollator(pad_token_id=0)([row])
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 8, 9, 0, 0, 0]], [[0, 1, 2, 0, 1, 0, 1, 2]])
    >>> batch["labels"].tolist(), batch["lengths"].tolist()
    ([[-100, 6, 7, -100, 9, -100, -100, -100]], [5])
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        """Collate rows.

        Args:
            rows: For each row its examples, as for :class:`milora_lightning.data.Collator`.

        Returns:
            ``input_ids``, ``labels`` and ``position_ids``, int64 of shape (batch, length), and ``lengths`` (batch,),
            the number of tokens in each row without padding. Positions restart at 0 with each example and with the
            padding. The first token of an example has no label, since no token in the row should predict it.
        """
        lengths = [sum(len(example["input_ids"]) for example in row) for row in rows]
        shape = len(rows), round_up(max(lengths), self.multiple)
        input_ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE_INDEX)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        for k, row in enumerate(rows):
            start = 0
            for example in row:
                ids = torch.tensor(example["input_ids"])
                stop = start + len(ids)
                input_ids[k, start:stop] = ids
                position_ids[k, start:stop] = torch.arange(len(ids))
                for first, last in learned_spans(example):
                    labels[k, start + max(first, 1) : start + last] = ids[max(first, 1) : last]
                start = stop
            position_ids[k, start:] = torch.arange(shape[1] - start)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": position_ids,
            "lengths": torch.tensor(lengths),
        }
