"""Reading the rows at a location, into the cache of ``datasets`` or as streams."""

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
from milora_lightning.data.slices import sliced, without_slice
from milora_lightning.data.sources import Split, cached_dataset
from milora_lightning.utils.errors import InvalidInputError

OpenRows = Callable[[int], Iterator[Row | None]]
"""Opens an iterator over rows; yields None for each of the given number of first rows, which are skipped."""


def file_rows(
    files: tuple[tuple[str, int, int], ...], fields: Fields, convert: Convert, task: str, unanswered: bool
) -> Iterator[Row]:
    """Read the rows of files, each given as path, size and modification time."""
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
    """Read the rows at a location and keep them in the cache of ``datasets``; arguments as for :func:`rows_at`.

    Returns:
        The rows; None if there are none and ``needed`` is false.
    """
    if is_hub_name(name):
        table = hub_dataset(name, split_name, needed)
        return None if table is None else cached_dataset(table_rows, columns, dataset=table, name=name, **reading)
    if is_saved(name):
        table = saved_dataset(name, split, without_slice(split_name), needed)
        if table is None:
            return None
        rows = cached_dataset(table_rows, columns, dataset=table, name=name, **reading)
    else:
        # Size and modification time are part of the cache's key, so that an edited file is read again.
        files = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files_at(name, split, needed))
        if not files:
            return None
        rows = cached_dataset(file_rows, columns, files=files, **reading)
    chosen = sliced(split_name, len(rows))
    return rows if len(chosen) == len(rows) else rows.select(chosen)


def prompt_lines(names: Sequence[str]) -> list[str]:
    """Read the lines of text files that are not blank.

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
        split_name: Name of the split in a data set.
        needed: Whether a missing split is an error.
        columns: Columns of every row; empty strings where a row has nothing.
        reading: Options for converting records to rows, see :func:`milora_lightning.data.reading.rows.rows_after`.

    Returns:
        One opener for each file or data set; an empty list if there is no such split and ``needed`` is false.

    Raises:
        FileNotFoundError: As for :func:`files_at` and :func:`hub_dataset`.
        ValueError: As for these, and for a slice of a split.
    """
    if "[" in split_name:
        raise InvalidInputError(
            f"A stream has no slices, such as {split_name!r}. Set {split}_split to a whole split, or data.streaming: "
            "false."
        )
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
    """Return the formats that were recognised, each with its number of rows."""
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
