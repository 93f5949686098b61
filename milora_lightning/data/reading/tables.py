"""Reading of records from tables: Parquet, Arrow, CSV and TSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from milora_lightning.data.reading.opening import open_text
from milora_lightning.utils.errors import InvalidInputError

AT_ONCE = 1000  # rows converted to Python objects together


def arrow_records(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a Parquet file, or an Arrow file or stream.

    Yields:
        The number of a row and its content.

    Raises:
        ValueError: If the file is damaged; says after which row.
    """
    row, is_parquet = 0, name.lower().endswith(".parquet")
    try:
        batches = pa.parquet.ParquetFile(name).iter_batches() if is_parquet else _arrow_batches(name)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        kind = "Parquet" if is_parquet else "Arrow"
        raise InvalidInputError(f"{name} is not a valid {kind} file ({error}). Write it anew.") from error
    while True:
        try:
            batch = next(batches, None)
        # Besides damaged pages: texts that are not UTF-8, times out of range, types without a counterpart in Python.
        except DAMAGES as error:
            raise _damaged(name, row, error) from error
        if batch is None:
            return
        for start in range(0, batch.num_rows, AT_ONCE):
            try:
                records = batch.slice(start, AT_ONCE).to_pylist()
            except DAMAGES as error:
                raise _damaged(name, row, error) from error
            yield from ((number, without_nulls(record)) for number, record in enumerate(records, row + 1))
            row += len(records)


DAMAGES = (pa.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError)


def _damaged(name: str, row: int, error: Exception) -> ValueError:
    return ValueError(f"{name} cannot be read after row {row} ({type(error).__name__}: {error}). Write it anew.")


def _arrow_batches(name: str) -> Iterator[pa.RecordBatch]:
    with open(name, "rb") as file:
        is_stream = file.read(6) != b"ARROW1"
    mapped = pa.memory_map(name)
    if is_stream:
        return iter(pa.ipc.open_stream(mapped))
    reader = pa.ipc.open_file(mapped)
    return (reader.get_batch(i) for i in range(reader.num_record_batches))


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """Remove nulls from nested lists and objects of a record: in tables, each of these has every field.

    >>> without_nulls({"a": None, "b": [{"role": "user", "name": None}]})
    {'a': None, 'b': [{'role': 'user'}]}
    """
    return {key: _inner(value) if isinstance(value, list | dict) else value for key, value in record.items()}


def _inner(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _inner(inner) for key, inner in value.items() if inner is not None}
    return [_inner(inner) for inner in value] if isinstance(value, list) else value


def csv_records(name: str, delimiters: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a table of text, whose first row names the fields.

    Args:
        name: Its path.
        delimiters: Possible delimiters of cells; the first one that occurs in the header row is used.

    Yields:
        The number of a row, not counting the header row, and its content.

    Raises:
        ValueError: If the file is malformed; says where.
    """
    csv.field_size_limit(2**31 - 1)  # texts are longer than the cells of other tables
    number = 0
    with open_text(name, newline="") as file:
        first = file.readline()
    with open_text(name, newline="") as file:
        delimiter = next((delimiter for delimiter in delimiters if delimiter in first), delimiters[0])
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if twice := [field for i, field in enumerate(names) if field in names[:i]]:
                raise InvalidInputError(f"The first row of {name} names the field {twice[0]!r} twice. Rename one.")
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(names):
                    raise InvalidInputError(
                        f"Row {number} (the first is row 1, after that of the names) of {name}, up to line "
                        f"{reader.line_num}, has {len(cells)} cells for the {len(names)} fields {names}. Correct it; "
                        f"texts with {delimiter!r} or line breaks have to be in quotation marks."
                    )
                yield number, dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise InvalidInputError(
                f"{name} is not valid CSV in line {reader.line_num} ({error}). Correct it."
            ) from error
