"""Packing several examples into one row; positions that restart at 0 keep them apart in attention."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
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
    return [generator.permutation(order[row]).tolist() for row in pack_sorted(sizes[order].tolist(), capacity)]


def pack_sorted(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack sizes that come in descending order; see :func:`pack`.

    Returns:
        For each row the indices of its members in ``sizes``.

    >>> pack_sorted([5, 4, 3, 2, 1], 6)
    [[0, 4], [1, 3], [2]]
    """
    rows: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # rows by the number of tokens that still fit
    rooms: list[int] = []  # the keys that have rows, in ascending order
    for index, size in enumerate(sizes):
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
    return rows


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
    """Collates training batches of rows that several examples share.

    There is no attention mask: with one, models of transformers would treat a row as a single example.

    Args:
        pad_token_id: Id of the padding token.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
        one_row: Put the examples of a whole batch into a single row, with padding only at its end.

    >>> row = [{"input_ids": [5, 6, 7], "spans": [0, 3]}, {"input_ids": [8, 9], "spans": [1, 2]}]
    >>> batch = PackingCollator(pad_token_id=0)([row])
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 8, 9, 0, 0, 0]], [[0, 1, 2, 0, 1, 0, 1, 2]])
    >>> batch["labels"].tolist(), batch["lengths"].tolist()
    ([[-100, 6, 7, -100, 9, -100, -100, -100]], [5])
    >>> batch = PackingCollator(pad_token_id=0, one_row=True)(row)
    >>> batch["input_ids"].tolist(), batch["cu_seq_lens"].tolist(), batch["max_length"]
    ([[5, 6, 7, 8, 9, 0, 0, 0]], [0, 3, 5, 8], 3)
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8, one_row: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of
        self.one_row = one_row

    def __call__(self, rows: Sequence[Sequence[Example]] | Sequence[Example]) -> dict[str, Any]:
        """Collate rows.

        Args:
            rows: For each row its examples, as for :class:`milora_lightning.data.Collator`, or its only example.

        Returns:
            ``input_ids``, ``labels`` and ``position_ids``, int64 of shape (batch, length), and ``lengths`` (batch,),
            the number of tokens in each row without padding. Positions restart at 0 with each example and with the
            padding. The first token of an example has no label, since no token in the row should predict it. A single
            row also comes with ``cu_seq_lens``, int32, the positions where examples and padding begin and where the row
            ends; and with ``max_length``, the length of the longest of them.
        """
        grouped: list[Sequence[Example]] = [[row] if isinstance(row, Mapping) else row for row in rows]
        if self.one_row:
            grouped = [[example for row in grouped for example in row]]
        lengths = [sum(len(example["input_ids"]) for example in row) for row in grouped]
        shape = len(grouped), round_up(max(lengths), self.multiple)
        input_ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE_INDEX)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        starts = [0]
        for k, row in enumerate(grouped):
            start = 0
            for example in row:
                ids = torch.tensor(example["input_ids"])
                stop = start + len(ids)
                input_ids[k, start:stop] = ids
                position_ids[k, start:stop] = torch.arange(len(ids))
                for first, last in learned_spans(example):
                    labels[k, start + max(first, 1) : start + last] = ids[max(first, 1) : last]
                start = stop
                starts.append(start)
            position_ids[k, start:] = torch.arange(shape[1] - start)
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": position_ids,
            "lengths": torch.tensor(lengths),
        }
        if not self.one_row:
            return batch
        if starts[-1] < shape[1]:
            starts.append(shape[1])
        longest = max(stop - start for start, stop in pairwise(starts))
        return {**batch, "cu_seq_lens": torch.tensor(starts, dtype=torch.int32), "max_length": longest}
