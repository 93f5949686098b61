"""Numbers as answers state them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from milora_lightning.metrics.numbers import read_number


@pytest.mark.parametrize(("text", "value"), [("10^50", 10**50), ("2^-100", Fraction(1, 2**100)), ("10^400", 10**400)])
def test_powers_are_exact(text: str, value: Fraction | int) -> None:
    assert read_number(text) == value


def test_powers_too_large_to_write_out_are_no_numbers() -> None:
    assert read_number("10^401") is None
