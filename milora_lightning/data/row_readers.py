"""Rows at a location: what the cache of ``datasets`` is filled with, and what streams open."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets

from milora_lightning.data.locations import files_at, hub_dataset, is_hub_name, is_saved, saved_dataset
from milora_lightning.data.reading.formats import Fields, Format
from milora_lightning.data.reading.opening import open_text
from milora_lightning.data.reading.records import read_records
from milora_lightning.data.reading.rows import FORMAT, Convert, Row, checked_rows, rows_after
from milora_lightning.data.reading.tables import without_nulls
from milora_lightning.data.sources import Split, cached_dataset

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


def kept_rows_at(
    name: str, split: Split, split_name: str, needed: bool, columns: tuple[str, ...], **reading: Any
) -> datasets.Dataset | None:
    """Read the rows at a location and keep them in the cache of ``datasets``; for the arguments see :func:`rows_at`.

    Returns:
        The rows; None only if there need not be any.
    """
    if is_hub_name(name) or is_saved(name):
        open_dataset = hub_dataset if is_hub_name(name) else functools.partial(saved_dataset, split=split)
        table = open_dataset(name, split_name=split_name, needed=needed)
        return None if table is None else cached_dataset(table_rows, columns, dataset=table, name=name, **reading)
    # Size and time of change go into the cache's key, so that an edited file is read again.
    files = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files_at(name, split, needed))
    return cached_dataset(file_rows, columns, files=files, **reading) if files else None


def prompt_lines(names: Sequence[str]) -> list[str]:
    """Read the lines of files of text that hold something.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If one cannot be read.
    """
    lines: list[str] = []
    for path in (path for name in names for path in files_at(name, "test", needed=True)):
        with open_text(str(path)) as file:
            lines += [line.rstrip("\n") for line in file if line.strip()]
    return lines


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
        reading: How rows are made of records, see :func:`milora_lightning.data.reading.rows.rows_after`.

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


def formats_of(dataset: datasets.Dataset) -> list[tuple[Format, int]]:
    """Return the formats that were recognised, and how many rows have each."""
    counts = dataset.data.column(FORMAT).value_counts().to_pylist()
    return [(Format.read(each["values"]), each["counts"]) for each in counts if each["values"]]


def _numbered(table: Any) -> Iterator[tuple[int, Any]]:
    return enumerate(map(without_nulls, table), 1)


def _open(
    columns: tuple[str, ...], opened: Callable[[], Any], name: str, reading: dict[str, Any], passed: int
) -> Iterator[Row | None]:
    empty = dict.fromkeys(columns, "")
    for row in rows_after(passed, opened(), name, **reading):
        yield None if row is None else {**empty, **row}
