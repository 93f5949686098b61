"""Counts in words."""

from __future__ import annotations


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Format a number with its noun.

    Args:
        number: The number.
        thing: The noun in singular.
        things: The plural, if it is not formed by adding an ``s``.

    >>> counted(1, "example"), counted(2400, "example"), counted(0, "batch", "batches")
    ('1 example', '2,400 examples', '0 batches')
    """
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
