"""Reading of data files into records with row numbers, and clear errors for files that cannot be read."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from milora_lightning.data.reading.opening import COMPRESSED, is_compressed, kind_of, open_text
from milora_lightning.data.reading.tables import arrow_records, csv_records
from milora_lightning.utils.errors import InvalidInputError

FORM = "a file holds one array of objects, or one object on each line"
LONGEST_TEXT = 1_000_000  # characters of a plain text that become one row


class Ambiguous(dict[str, Any]):
    """A record in which a field occurs twice."""

    twice: str


def read_records(name: str) -> Iterator[tuple[int, Any]]:
    """Read a file.

    Args:
        name: Its path, for which :func:`is_data_file` is true.

    Yields:
        The number of a row and its content, which is a dict if the file is in order. In JSON lines, rows are lines.

    Raises:
        ValueError: If the file cannot be read, or is malformed; the message says where.
    """
    try:
        yield from READERS[kind_of(name)](name)
    except OSError as error:
        raise InvalidInputError(f"{name} cannot be read ({type(error).__name__}: {error}). Check the file.") from error


def is_data_file(name: str | Path) -> bool:
    """Return whether a name has the suffix of a file that can be read."""
    kind = kind_of(name)
    return kind in (TEXT_SUFFIXES if is_compressed(name) else READERS)


def _json_records(name: str) -> Iterator[tuple[int, Any]]:
    line = 0
    try:
        with open_text(name) as file:
            first = _first_character(file)
        with open_text(name) as file:
            if first == "[":
                yield from enumerate(_decode(file.read()), 1)
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, _decode(text)
    except json.JSONDecodeError as error:
        if line:
            _refuse_spread_objects(name, line)
        arrays = "; an array on each line names no fields" if first == "[" and error.msg == "Extra data" else ""
        raise InvalidInputError(
            f"{name} is not valid JSON in line {line or error.lineno}, column {error.colno} ({error.msg}). Correct it; "
            f"{FORM}{arrays}."
        ) from error
    except RecursionError as error:
        where = f"line {line} of {name}" if line else name
        raise InvalidInputError(
            f"In {where} there are lists or objects nested too deeply to be read. Correct it."
        ) from error


def _texts(name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a file as one text, or as several texts of whole lines if it is large."""
    number, lines, length = 0, [], 0
    with open_text(name) as file:
        for line in file:
            lines.append(line)
            length += len(line)
            if length >= LONGEST_TEXT:
                number += 1
                yield number, {"text": "".join(lines)}
                lines, length = [], 0
    if "".join(lines).strip():
        yield number + 1, {"text": "".join(lines)}


READERS: dict[str, Callable[[str], Iterator[tuple[int, Any]]]] = {
    ".json": _json_records,
    ".jsonl": _json_records,
    ".ndjson": _json_records,
    ".csv": functools.partial(csv_records, delimiters=",;\t"),
    ".tsv": functools.partial(csv_records, delimiters="\t"),
    ".txt": _texts,
    ".parquet": arrow_records,
    ".arrow": arrow_records,
}
TEXT_SUFFIXES = tuple(suffix for suffix, reader in READERS.items() if reader is not arrow_records)
"""Suffixes of files that may also be compressed."""
SUFFIXES = (*READERS, *(f"{suffix}{end}" for suffix in TEXT_SUFFIXES for end in COMPRESSED))


def _first_character(file: IO[str]) -> str:
    """Return the first character that is not white space."""
    first = ""
    while not first and (text := file.read(1 << 16)):
        first = text.lstrip()[:1]
    return first


def _decode(text: str) -> Any:
    return _decoder().decode(text)


@functools.cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)


def _integer(digits: str) -> int | str:
    """Read an integer; one with more digits than Python converts stays text."""
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
    """Raise a clear error if the line that cannot be parsed begins an object spread over several lines."""
    with open_text(name) as file:
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
    raise InvalidInputError(f"{name} {what} line {line}. {remedy}.")
