"""Rows at a location: what the cache of ``datasets`` is filled with, and what streams open."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import datasets

from milora_lightning.data.formats import Fields
from milora_lightning.data.locations import files_at, hub_dataset, is_hub_name, is_saved, saved_dataset
from milora_lightning.data.records import read_records
from milora_lightning.data.rows import Convert, Row, checked_rows, rows_after
from milora_lightning.data.sources import Split
from milora_lightning.data.tables import without_nulls

OpenRows = Callable[[int], Iterator["Row | None"]]
"""Opens rows; told how many of them to pass over, yields None for each of these."""


def file_rows(
    files: tuple[tuple[str, int, int], ...], fields: Fields, convert: Convert, task: str, unanswered: bool
) -> Iterator[Row]:
    """Read the rows of files, each named with its size and time of change."""
    for name, _, _ in files:
        yield from checked_rows(read_records(name), name, fields, convert, task, unanswered)


def table_rows(
    dataset: datasets.Dataset, name: str, fields: Fields, convert: Convert, task: str, unanswered: bool
) -> Iterator[Row]:
    """Read the rows of a table."""
    yield from checked_rows(enumerate(map(without_nulls, dataset), 1), name, fields, convert, task, unanswered)


def rows_at(
    name: str, split: Split, split_name: str, needed: bool, columns: tuple[str, ...], **reading: Any
) -> list[OpenRows]:
    """Find the rows at a location, without reading them.

    Args:
        name: The location.
        split: Which split.
        split_name: What it is called in a data set.
        needed: Whether there has to be one.
        columns: Columns that every row is to have, empty where it has nothing.
        reading: How rows are made of records, see :func:`milora_lightning.data.rows.rows_after`.

    Returns:
        What opens them, one for each file; none only if there need not be any.

    Raises:
        FileNotFoundError: As :func:`files_at` and :func:`hub_dataset`.
        ValueError: As these.
    """
    if is_hub_name(name) or is_saved(name):
        table = (
            hub_dataset(name, split_name, needed, streaming=True)
            if is_hub_name(name)
            else saved_dataset(name, split, split_name, needed)
        )
        records: list[tuple[str, Callable[[], Any]]] = []
        if table is not None:
            records = [(name, functools.partial(_numbered, table))]
    else:
        records = [(str(path), functools.partial(read_records, str(path))) for path in files_at(name, split, needed)]
    return [functools.partial(_open, columns, opened, part, reading) for part, opened in records]


def _numbered(table: Any) -> Iterator[tuple[int, Any]]:
    return enumerate(map(without_nulls, table), 1)


def _open(
    columns: tuple[str, ...], opened: Callable[[], Any], name: str, reading: dict[str, Any], passed: int
) -> Iterator[Row | None]:
    empty = dict.fromkeys(columns, "")
    for row in rows_after(passed, opened(), name, **reading):
        yield None if row is None else {**empty, **row}
