"""Values by layer: regular expressions for the ends of names, as in PEFT's ``rank_pattern``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from milora_lightning.utils.errors import InvalidInputError

Value = TypeVar("Value")


def ends_in(name: str, pattern: str) -> bool:
    r"""Whether a regular expression matches the end of a layer's name, starting after a dot.

    Args:
        name: The layer's name.
        pattern: The regular expression.

    >>> [ends_in("layers.0.q_proj", pattern) for pattern in ("q_proj", "[qk]_proj", "proj", r"layers\.0.*")]
    [True, True, False, True]
    """
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def first_match(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """Return the value of the first pattern that matches the end of a layer's name.

    Args:
        patterns: Values by pattern.
        name: The layer's name.
        default: Value of a layer that no pattern matches.

    >>> first_match({"down_proj": 4, ".*": 8}, "layers.0.down_proj", 16)
    4
    """
    return next((value for pattern, value in patterns.items() if ends_in(name, pattern)), default)


def check_keys(option: str, patterns: Iterable[str]) -> None:
    """Refuse keys of an option that are not valid regular expressions.

    Raises:
        ValueError: If one is invalid.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InvalidInputError(
                f"{option} has the key {pattern!r}, which is no regular expression: {error}."
            ) from error


def check_patterns(option: str, patterns: Mapping[str, float], whole: bool = False) -> None:
    """Refuse patterns that are not valid regular expressions, and values that are not positive.

    Args:
        option: Name of the option that has these patterns, for the message.
        patterns: Values by pattern.
        whole: Whether the values have to be whole numbers.

    Raises:
        ValueError: If a pattern or a value is wrong.
    """
    check_keys(option, patterns)
    for pattern, value in patterns.items():
        if value <= 0 or (whole and value != int(value)):
            wanted = "a whole number of at least 1" if whole else "positive"
            raise InvalidInputError(f"{option} must be {wanted} for each key, not {value} as for {pattern!r}.")


def check_parts(option: str, patterns: Mapping[str, int | Sequence[int]]) -> None:
    """Refuse patterns that are not valid regular expressions, and values that do not specify how a layer is divided.

    Args:
        option: Name of the option that has these patterns, for the message.
        patterns: By pattern, the number of equal parts or the sizes of all parts.

    Raises:
        ValueError: If a pattern or a value is wrong.
    """
    check_keys(option, patterns)
    for pattern, value in patterns.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            valid = len(value) > 1 and all(type(size) is int and size > 0 for size in value)
        else:
            valid = type(value) is int and value > 1
        if not valid:
            raise InvalidInputError(
                f"{option} must have a number of equal parts or the rows of each part for each key, at least two of "
                f"them, not {value!r} as for {pattern!r}."
            )
