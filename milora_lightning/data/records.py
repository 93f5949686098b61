"""Records of JSON, JSON lines and Parquet files, each with its row, and one sentence for whatever cannot be read."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

SUFFIXES = (".json", ".jsonl", ".parquet")
MAGIC = {
    b"\x1f\x8b": "is compressed with gzip: unpack it",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"BZh": "is compressed with bzip2: unpack it",
    b"\xfd7zX": "is compressed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it",
    b"PAR1": "is a Parquet file: let its name end in .parquet",
}
FORM = "a file holds one array of objects, or one object on each line"


class Ambiguous(dict[str, Any]):
    """A record in which a field comes twice."""

    twice: str


def read_records(name: str) -> Iterator[tuple[int, Any]]:
    """Read a file.

    Args:
        name: Its path, which ends in one of ``SUFFIXES``.

    Yields:
        The number of a row, and what is in it: a dict, if the file is in order. In JSON lines, rows are lines.

    Raises:
        ValueError: If the file cannot be read, or is malformed; says where.
    """
    try:
        if name.endswith(".parquet"):
            yield from _parquet_records(name)
        else:
            yield from _json_records(name)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({type(error).__name__}: {error}). Check the file.") from error


def _parquet_records(name: str) -> Iterator[tuple[int, Any]]:
    row = 0
    try:
        batches = pa.parquet.ParquetFile(name).iter_batches()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(f"{name} is not a valid Parquet file ({error}). Write it anew.") from error
    while True:
        try:
            batch = next(batches, None)
            records = batch.to_pylist() if batch is not None else None
        # Besides damaged pages: texts that are not UTF-8, times out of range, types that Python has no counterpart of.
        except (pa.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError) as error:
            raise ValueError(
                f"{name} cannot be read after row {row} ({type(error).__name__}: {error}). Write it anew."
            ) from error
        if records is None:
            return
        yield from enumerate(records, row + 1)
        row += len(records)


def _json_records(name: str) -> Iterator[tuple[int, Any]]:
    with open(name, "rb") as binary:
        beginning = binary.read(4)
    for magic, what in MAGIC.items():
        if beginning.startswith(magic):
            raise ValueError(f"{name} {what}.")
    line = 0
    try:
        with open(name, encoding="utf-8-sig") as file:
            if _first_character(file) == "[":
                yield from enumerate(_decode(file.read()), 1)
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, _decode(text)
    except json.JSONDecodeError as error:
        if line:
            _refuse_spread_objects(name, line)
        raise ValueError(
            f"{name} is not valid JSON in line {line or error.lineno}, column {error.colno} ({error.msg}). Correct it; "
            f"{FORM}."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8 ({error}). Convert it.") from error
    except RecursionError as error:
        where = f"line {line} of {name}" if line else name
        raise ValueError(f"In {where} there are lists or objects nested too deeply to be read. Correct it.") from error


def _first_character(file: IO[str]) -> str:
    """Return the first character that is no white space, and go back to the beginning."""
    first = ""
    while not first and (text := file.read(1 << 16)):
        first = text.lstrip()[:1]
    file.seek(0)
    return first


def _decode(text: str) -> Any:
    return _decoder().decode(text)


@functools.cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)


def _integer(digits: str) -> int | str:
    """Read an integer; one of more digits than Python converts stays the text that it is written as."""
    try:
        return int(digits)
    except ValueError:
        return digits


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    seen: set[str] = set()
    ambiguous = Ambiguous(record)
    ambiguous.twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return ambiguous


def _refuse_spread_objects(name: str, line: int) -> None:
    """Say it if what was taken for a line is the beginning of an object over several lines."""
    with open(name, encoding="utf-8-sig") as file:
        lines = file.readlines()
    text, before = "".join(lines[line - 1 :]), "".join(lines[: line - 1])
    start = len(text) - len(text.lstrip())
    try:
        value, end = _decoder().raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError):
        return
    if not isinstance(value, dict) or "\n" not in text[start:end]:
        return
    lists = [key for key, entry in value.items() if isinstance(entry, list) and entry and isinstance(entry[0], dict)]
    if text[end:].strip() or before.strip():
        what = "holds objects that are spread over several lines, from"
        remedy = f"Write each on one line, or all in one array: {FORM}"
    else:
        what = f"is a single object with the fields {list(value)}, which begins in"
        remedy = f"Write the array in its field {lists[0]!r} to a file" if lists else f"Put it into an array: {FORM}"
    raise ValueError(f"{name} {what} line {line}. {remedy}.")
