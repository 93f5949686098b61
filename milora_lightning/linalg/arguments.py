"""The named slices of a spectrum, and the check that a weight has the requested one."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from milora_lightning.utils.errors import InvalidInputError

Slice = Literal["minor", "principal", "middle", "random"]

POSITIONS = {"principal": 0.0, "middle": 0.5, "minor": 1.0}
"""Relative position of each named slice: 0.0 starts at the largest singular value, 1.0 ends at the smallest."""


def check_slice(weight: Tensor, r: int, which: str | float) -> None:
    """Refuse arguments that :func:`milora_lightning.singular_slice` cannot compute a slice from.

    Args:
        weight: The weight, which has to be a floating-point matrix with values.
        r: Number of triplets, from 1 to min(out, in).
        which: Name or position of the slice.

    Raises:
        ValueError: If one of them is wrong.
    """
    if which not in get_args(Slice) and not (isinstance(which, (int, float)) and 0 <= which <= 1):
        raise InvalidInputError(
            f"unknown slice {which!r}: choose one of {', '.join(get_args(Slice))}, or a position from 0.0 to 1.0"
        )
    if weight.ndim != 2:
        raise InvalidInputError(
            f"a weight of shape {tuple(weight.shape)} has no singular vectors: pass a matrix (out, in)"
        )
    if not weight.is_floating_point():
        raise InvalidInputError(f"a weight of {weight.dtype} cannot be decomposed: pass it in a floating-point dtype")
    if weight.is_meta:
        raise InvalidInputError("a weight on the meta device has no values: load it before decomposing it")
    k = min(weight.shape)
    if not 1 <= r <= k:
        raise InvalidInputError(
            f"a weight of shape {tuple(weight.shape)} has {k} triplets, not {r}: set r from 1 to {k}"
        )
