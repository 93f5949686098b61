"""Conversion of records to rows: checks the fields of an example and converts them to text."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from milora_lightning.data.reading.conversations import as_json, conversation_of, read_tools
from milora_lightning.data.reading.formats import (
    AUTO,
    INPUTS,
    OTHERS,
    Fields,
    Format,
    Kind,
    is_filled,
    recognise,
    with_response,
)
from milora_lightning.data.reading.records import Ambiguous
from milora_lightning.data.reading.values import as_text, shown
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError

Row = dict[str, str]
Convert = Callable[[dict[str, Any]], dict[str, Any]]
OPTIONAL = ("input", "task", "prompt_role")
TABLE = re.compile(r"\.[ct]sv(\.\w+)?$", re.IGNORECASE)
BEGINNING = 1000  # number of first rows whose fields determine the format
FORMAT = "format"
"""Column with the recognised format as JSON: its kind and the field of each column."""
UNREAD = "unread"
"""Column with the non-empty fields of a record that were not read, as a JSON list."""


class Watched(dict[str, Any]):
    """A record that notes which of its fields are read."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Read a field, if it is there."""
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """Read and remove a field."""
        self.read.add(key)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # overridden so that dict(record) and {**record} call __getitem__ for each field

    def items(self) -> Any:
        """Read all fields."""
        self.read.update(self)
        return super().items()

    def values(self) -> Any:
        """Read all fields."""
        self.read.update(self)
        return super().values()

    def copy(self) -> dict[str, Any]:
        """Read all fields."""
        return dict(self.items())

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()


def checked_rows(
    records: Iterable[tuple[int, Any]], name: str, fields: Fields, convert: Convert, task: str, unanswered: bool = False
) -> Iterator[Row]:
    """Convert all records to rows; see :func:`rows_after`.

    Args:
        records: Row numbers and contents.
        name: Where the records come from, for messages.
        fields: The field that each column is read from; ``"auto"`` to recognise it.
        convert: Converts a record to one with these fields.
        task: Name of the test set; empty to read it from a field, if there is one.
        unanswered: Whether a record may lack the field of the response.
    """
    return cast("Iterator[Row]", rows_after(0, records, name, fields, convert, task, unanswered))


def rows_after(
    passed: int,
    records: Iterable[tuple[int, Any]],
    name: str,
    fields: Fields,
    convert: Convert,
    task: str,
    unanswered: bool = False,
) -> Iterator[Row | None]:
    """Convert records to rows, skipping the first ones.

    Args:
        passed: Number of first records to skip: they are read, and count for recognising the format, but are not
            checked.
        records: Row numbers and contents.
        name: Where the records come from, for messages.
        fields: The field that each column is read from; ``"auto"`` to recognise it.
        convert: Converts a record to one with these fields.
        task: Name of the test set; empty to read it from a field, if there is one.
        unanswered: Whether a record may lack the field of the response.

    Yields:
        The columns of an example, ``UNREAD``, and ``FORMAT`` if the format was recognised; None for a record that is
        skipped.

    Raises:
        ValueError: If there are no rows, or a row is malformed; the message says which, and why.
    """
    converted = _converted_records(records, name, convert)
    if unanswered:
        converted = ((where, watched, with_response(record, fields)) for where, watched, record in converted)
    beginning = list(itertools.islice(converted, BEGINNING if AUTO in fields.values() else 1))
    if not beginning:
        raise InvalidInputError(f"There are no rows in {name}. Point to data that is not empty.")
    format = _recognised(fields, [record for *_, record in beginning], beginning[0][0])
    note = {FORMAT: format.note()} if AUTO in fields.values() else {}
    read = set(format.fields.values())
    early = {key for _, watched, _ in beginning for key in watched if is_filled(dict.get(watched, key))}
    for index, (where, watched, record) in enumerate(itertools.chain(beginning, converted)):
        if index < passed:
            yield None
            continue
        if note and not format.fits(record):
            _refuse_other_format(fields, format, record, where)
        row = READERS[format.kind](record, format.fields, where)
        unread = (key for key in watched if key not in watched.read and key not in read)
        row[UNREAD] = _as_json(tuple(key for key in unread if is_filled(dict.get(watched, key))))
        if note:
            _refuse_late(fields, format, row[UNREAD], early, where)
        row["task"] = task or row.get("task", "")
        yield {**row, **note}


def _converted_records(
    records: Iterable[tuple[int, Any]], name: str, convert: Convert
) -> Iterator[tuple[str, Watched, dict[str, Any]]]:
    """Yield the place of each record, the record, and the record after conversion."""
    for number, record in records:
        where = f"row {number} (the first is row 1) of {name}"
        if not isinstance(record, dict):
            raise InvalidInputError(
                f"In {where} there is no object with fields but {type(record).__name__}: {shown(record)}."
            )
        if isinstance(record, Ambiguous):
            raise InvalidInputError(f"The field {record.twice!r} comes twice in {where}. Remove one.")
        watched = Watched(record)
        yield where, watched, _converted(convert, watched, where)


def _recognised(fields: Fields, records: list[dict[str, Any]], where: str) -> Format:
    try:
        format = recognise(fields, records)
    except MiLoRAError as error:
        raise InvalidInputError(f"In {where}, {error}") from error
    if format is None:
        inner = next((name for name, value in records[0].items() if _holds_rows(value)), None)
        if len(records) == 1 and inner is not None:
            raise InvalidInputError(
                f"In {where} the rows seem to be in the field {inner!r}. Write the array that it holds to a file of "
                "its own."
            )
        header = " The first line of such a file has to name the fields." if TABLE.search(where) else ""
        raise InvalidInputError(
            f"In {where} there are the fields {sorted(map(str, records[0]))}, and none is known to hold an "
            "example, as messages, conversations, prompt and completion, text and others are. Name yours: set "
            f"prompt_field and response_field, messages_field, or text_field.{header}"
        )
    return format


def _holds_rows(value: Any) -> bool:
    """Whether the value of a field is a list of records, rather than of messages."""
    is_list = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    return is_list and not value[0].keys() & {"role", "from"}


def _refuse_other_format(fields: Fields, format: Format, record: dict[str, Any], where: str) -> None:
    """Raise a clear error if a record has another format than those before it, instead of lacking a field."""
    try:
        other = recognise(fields, [record])
    except ValueError:
        return
    if other is not None and (other.kind, other.needed) != (format.kind, format.needed):
        raise InvalidInputError(
            f"In {where} there is {other}, but in the first row {format}: a file holds one format. Put the rows into "
            "files of their own."
        )


@functools.lru_cache
def _late(unread: str) -> list[tuple[str, str]]:
    """Return pairs (column, field) of the unread fields that would belong to a column."""
    columns = {name: column for column, names in {"input": INPUTS, **OTHERS}.items() for name in names}
    return [(columns[field.lower()], field) for field in json.loads(unread) if str(field).lower() in columns]


def _refuse_late(fields: Fields, format: Format, unread: str, early: set[str], where: str) -> None:
    """Refuse a field that belongs to the example, but is empty in all rows that determined the format."""
    for column, field in _late(unread) if unread != "[]" else ():
        around = ("system", "tools") if "messages" in format.fields else ("input", *OTHERS)
        if field not in early and fields.get(column) == AUTO and column in around and format.kind != "texts":
            raise InvalidInputError(
                f"There is something in {field!r} in {where}, but in none of the first {BEGINNING} rows. Set "
                f"{column}_field: {field}, or null to leave it out."
            )


def _conversation(record: dict[str, Any], fields: Fields, where: str) -> Row:
    try:
        messages = as_json(conversation_of(record, fields), "the conversation")
        tools = read_tools(record.get(field), field) if (field := fields.get("tools")) else ""
    except MiLoRAError as error:
        raise InvalidInputError(f"In {where}: {error}") from error
    return {"messages": messages, "tools": tools, **_checked(record, {"task": fields["task"]}, where)}


@functools.cache
def _as_json(names: tuple[Any, ...]) -> str:
    return json.dumps(names)


def _converted(convert: Convert, record: Watched, where: str) -> dict[str, Any]:
    try:
        converted = convert(record)
    except ValueError as error:
        raise InvalidInputError(f"In {where}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        name = getattr(convert, "__qualname__", type(convert).__name__)
        raise InvalidInputError(f"In {where}: {name} fails with {type(error).__name__}: {error}.") from error
    if not isinstance(converted, dict):
        raise InvalidInputError(
            f"In {where}: the converter returns {type(converted).__name__}, but has to return a dict."
        )
    return converted


def _checked(record: dict[str, Any], fields: Fields, where: str) -> Row:
    """Return the columns of a record as text."""
    row = {}
    for column, field in fields.items():
        if field is None or (column in OPTIONAL and record.get(field) is None):
            row[column] = ""
            continue
        if field not in record:
            raise InvalidInputError(
                f"There is no field {field!r} in {where}; it has {sorted(map(str, record))}. Correct the row, or set "
                f"{column}_field to the right one."
            )
        value = record[field]
        if type(value) is str and value.isascii():  # the common case, without building an error message
            row[column] = value
            continue
        remedy = "Correct or remove the row"
        if column == "input":
            remedy += ", or leave the field out with input_field: null"
        row[column] = as_text(value, f"The field {field!r} in {where}", remedy)
    return row


READERS: dict[Kind, Callable[[dict[str, Any], Fields, str], Row]] = {
    "prompts": _checked,
    "conversations": _conversation,
    "texts": _checked,
}
"""The function that converts a record to a row, by kind."""
