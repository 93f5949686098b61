"""A count of held-out rows that also occur in the training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import datasets
import pyarrow as pa
import pyarrow.compute as pc

CONTENT = ("messages", "tools", "prompt", "input", "response", "text")
"""Columns by which rows are compared."""
AT_ONCE = 10_000  # number of rows compared at a time


def trained_copies(dataset: datasets.Dataset, held_out: Sequence[int]) -> int:
    """Count the held-out rows that have a copy in the training data.

    Args:
        dataset: The rows.
        held_out: Indices of the held-out rows.

    >>> rows = datasets.Dataset.from_dict({"prompt": ["a", "b", "a", "a"], "response": ["1", "2", "1", "3"]})
    >>> trained_copies(rows, [0]), trained_copies(rows, [0, 2]), trained_copies(rows, [1, 3])
    (1, 0, 0)
    """
    columns = [name for name in CONTENT if name in dataset.column_names]
    rows = dataset.select_columns(columns).with_format("arrow")
    held = cast(pa.Table, rows[list(held_out)])
    mine = [tuple(row.values()) for row in held.to_pylist()]
    left = dict.fromkeys(mine, 0)
    for start in range(0, len(rows), AT_ONCE):
        table = cast(pa.Table, rows[start : start + AT_ONCE])
        for name in columns:  # the first column already leaves few rows
            table = table.filter(pc.is_in(table[name], value_set=held[name].combine_chunks()))
        for row in table.to_pylist():
            if (key := tuple(row.values())) in left:
                left[key] += 1
    for key in mine:
        left[key] -= 1
    return sum(left[key] > 0 for key in mine)
