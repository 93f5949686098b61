"""Conversion of a record's values to text."""

from __future__ import annotations

import math
import numbers
from decimal import Decimal
from typing import Any

from milora_lightning.utils.errors import InvalidInputError


def question(prompt: str, input: str) -> str:
    """Join a prompt and its input into one user message."""
    return f"{prompt}\n\n{input}" if input else prompt


def as_text(value: Any, what: str, remedy: str = "Correct or remove the row") -> str:
    """Return a text, or a number as text.

    Args:
        value: The value.
        what: What holds the value, for the error message.
        remedy: What to do about it, for the error message.

    Raises:
        ValueError: If it is neither, or cannot be written in UTF-8.

    >>> as_text(3, "The field 'a'"), as_text("3", "The field 'a'")
    ('3', '3')
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                f"{what} holds half a character at position {error.start} ({value[error.start]!r}, a lone surrogate), "
                f"which is no text. {remedy}."
            ) from error
        return str(value)
    if _is_number(value):
        try:
            return str(value)
        except ValueError as error:
            raise InvalidInputError(f"{what} holds too long a number ({error}). {remedy}.") from error
    raise InvalidInputError(f"{what} holds {shown(value)} ({type(value).__name__}), which is no text. {remedy}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, numbers.Rational):  # integers too
        return True
    return isinstance(value, numbers.Real | Decimal) and math.isfinite(value)


def shown(value: Any) -> str:
    """Return the beginning of a value's repr, or a placeholder if the repr fails."""
    try:
        return f"{value!r:.80}"
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        return "a value too large to show"
