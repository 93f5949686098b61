"""Slices of a split, such as ``train[:100000]``, for data that are not on the Hub."""

from __future__ import annotations

import re

from milora_lightning.utils.errors import InvalidInputError

_SLICE = re.compile(r"([^\[\]+]*)\[(-?\d[\d_]*%?)?:(-?\d[\d_]*%?)?\]")


def without_slice(split_name: str) -> str:
    """Return the name of a split without its slice.

    >>> without_slice("train[:100000]"), without_slice("train_sft")
    ('train', 'train_sft')
    """
    return split_name.partition("[")[0]


def sliced(split_name: str, rows: int) -> range:
    """Return the range of rows that a split name with a slice refers to.

    As in Python, a slice beyond the end is cut off there.

    Args:
        split_name: Name of the split; rows or percentages may follow it: ``train[:100000]``, ``train[-10%:]``.
        rows: Number of rows of the whole split.

    Raises:
        ValueError: If the slice is invalid or empty.

    >>> sliced("train", 5), sliced("train[:3]", 5), sliced("train[-40%:]", 5), sliced("train[2:100_000]", 5)
    (range(0, 5), range(0, 3), range(3, 5), range(2, 5))
    """
    if "[" not in split_name:
        return range(rows)
    found = _SLICE.fullmatch(split_name.strip())
    if found is None:
        raise InvalidInputError(
            f"The split {split_name!r} cannot be read: one slice of rows or percentages is possible, such as "
            "train[:1000] or train[10%:20%]."
        )
    chosen = range(rows)[slice(*(_place(edge, rows) for edge in found.groups()[1:]))]
    if not chosen:
        raise InvalidInputError(f"The split {split_name!r} of {rows} rows holds none. Choose another slice.")
    return chosen


def _place(edge: str | None, rows: int) -> int | None:
    if edge is None or not edge.endswith("%"):
        return edge if edge is None else int(edge)
    return round(int(edge[:-1]) * rows / 100)
