"""Numbers of things in words."""

from __future__ import annotations


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Write how many there are of something.

    Args:
        number: How many.
        thing: What one is called.
        things: What several are called, if not by an ``s``.

    >>> counted(1, "example"), counted(2400, "example"), counted(0, "batch", "batches")
    ('1 example', '2,400 examples', '0 batches')
    """
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
