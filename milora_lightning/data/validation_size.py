"""The number of training examples held out for validation."""

from __future__ import annotations

import math
from typing import Literal

from milora_lightning.utils.errors import InvalidInputError

AUTO_SHARE, AUTO_MAXIMUM = 0.05, 500
AUTO_LEAST_DATA = 20  # of fewer examples, at most one would be held out, which is meaningless


def held_out_examples(validation_size: int | float | Literal["auto"], size: int) -> int:
    """Return how many of ``size`` training examples are held out.

    Raises:
        ValueError: If ``validation_size`` is neither a fraction nor a whole number below ``size``.

    >>> held_out_examples("auto", 100), held_out_examples("auto", 10), held_out_examples(0.25, 10)
    (5, 0, 3)
    """
    if isinstance(validation_size, str):
        return min(AUTO_MAXIMUM, math.ceil(AUTO_SHARE * size)) if size >= AUTO_LEAST_DATA else 0
    held_out = validation_size if validation_size >= 1 else math.ceil(validation_size * size)
    if held_out and not (0 < held_out < size and held_out == int(held_out)):
        raise InvalidInputError(
            f"validation_size is {validation_size}, but must be a whole number below the {size} examples of train, or "
            "a fraction between 0 and 1."
        )
    return int(held_out)


def held_out_rows(validation_size: int | float | Literal["auto"]) -> int:
    """Return how many first rows of a stream are held out; none for ``"auto"``.

    Raises:
        ValueError: If ``validation_size`` is a fraction, since the length of a stream is not known.
    """
    if isinstance(validation_size, str):
        return 0
    if validation_size < 0 or validation_size != int(validation_size):
        raise InvalidInputError(
            f"validation_size is {validation_size}, a share of a stream, whose length is not known: give a number, and "
            "as many first rows of train are held out; or 0, or validation data."
        )
    return int(validation_size)
