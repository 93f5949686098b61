"""From records to rows: the texts of an example, taken from the fields of a record."""

from __future__ import annotations

import functools
import json
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from typing import Any

from milora_lightning.data.records import Ambiguous

Row = dict[str, str]
Fields = dict[str, "str | None"]
Convert = Callable[[dict[str, Any]], dict[str, Any]]
OPTIONAL = ("input", "task", "prompt_role")
UNREAD = "unread"
"""Column with the fields of a record that hold something and were not read, as a list in JSON."""


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
        return super().__iter__()  # overridden so that dict(record) and {**record} read field by field

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
    records: Iterable[tuple[int, Any]], name: str, fields: Fields, convert: Convert, task: str
) -> Iterator[Row]:
    """Make rows of records.

    Args:
        records: The number of a row and what is in it, one after the other.
        name: Where they come from, for messages.
        fields: The field that each column is read from.
        convert: Brings a record into these fields.
        task: Name of the test set; empty to read it from a field, if there is one.

    Raises:
        ValueError: If there are no rows, or one is not as it should be; says which, and why.
    """
    number, read = 0, set(fields.values())
    for number, record in records:
        where = f"row {number} (the first is row 1) of {name}"
        if not isinstance(record, dict):
            raise ValueError(f"In {where} there is no object with fields but {type(record).__name__}: {shown(record)}.")
        if isinstance(record, Ambiguous):
            raise ValueError(f"The field {record.twice!r} comes twice in {where}. Remove one.")
        watched = Watched(record)
        row = _checked(_converted(convert, watched, where), fields, where)
        unread = (key for key in record if key not in watched.read and key not in read)
        row[UNREAD] = _as_json(tuple(key for key in unread if record[key] not in (None, "", [], {})))
        row["task"] = task or row["task"]
        yield row
    if number == 0:
        raise ValueError(f"There are no rows in {name}. Point to data that is not empty.")


@functools.cache
def _as_json(names: tuple[str, ...]) -> str:
    return json.dumps(names)


def _converted(convert: Convert, record: Watched, where: str) -> dict[str, Any]:
    try:
        converted = convert(record)
    except ValueError as error:
        raise ValueError(f"In {where}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        name = getattr(convert, "__qualname__", type(convert).__name__)
        raise ValueError(f"In {where}: {name} fails with {type(error).__name__}: {error}.") from error
    if not isinstance(converted, dict):
        raise ValueError(f"In {where}: the converter returns {type(converted).__name__}, but has to return a dict.")
    return converted


def _checked(record: dict[str, Any], fields: Fields, where: str) -> Row:
    """Take the texts of the columns out of a record."""
    row = {}
    for column, field in fields.items():
        if field is None or (column in OPTIONAL and record.get(field) is None):
            row[column] = ""
            continue
        if field not in record:
            raise ValueError(
                f"There is no field {field!r} in {where}; it has {sorted(map(str, record))}. Correct the row, or set "
                f"{column}_field to the right one."
            )
        value = record[field]
        if type(value) is str and value.isascii():  # most are, and need no sentence prepared
            row[column] = value
            continue
        remedy = "Correct or remove the row"
        if column == "input":
            remedy += ", or leave the field out with input_field: null"
        row[column] = as_text(value, f"The field {field!r} in {where}", remedy)
    return row


def as_text(value: Any, what: str, remedy: str = "Correct or remove the row") -> str:
    """Return a text, or a number as text.

    Args:
        value: The value.
        what: What holds it, for messages.
        remedy: What to do about it, for messages.

    Raises:
        ValueError: If it is neither, or cannot be written in UTF-8.

    >>> as_text(3, "The field 'a'"), as_text("3", "The field 'a'")
    ('3', '3')
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} holds half a character at position {error.start} ({value[error.start]!r}, a lone surrogate), "
                f"which is no text. {remedy}."
            ) from error
        return str(value)
    if _is_number(value):
        try:
            return str(value)
        except ValueError as error:
            raise ValueError(f"{what} holds too long a number ({error}). {remedy}.") from error
    raise ValueError(f"{what} holds {shown(value)} ({type(value).__name__}), which is no text. {remedy}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, numbers.Rational):  # integers too
        return True
    return isinstance(value, numbers.Real | Decimal) and math.isfinite(value)


def shown(value: Any) -> str:
    """Return the beginning of a value's representation, if it has any."""
    try:
        return f"{value!r:.80}"
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        return "a value too large to show"
