"""How many examples are held out, at the borders of the rules."""

from __future__ import annotations

import pytest

from milora_lightning.data.validation_size import held_out_examples, held_out_rows


@pytest.mark.parametrize(("size", "held_out"), [(0, 0), (19, 0), (20, 1), (21, 2), (10_000, 500), (10**6, 500)])
def test_auto_is_a_twentieth_of_enough_data_and_not_more_than_500(size: int, held_out: int) -> None:
    assert held_out_examples("auto", size) == held_out


def test_something_is_left_to_train_on() -> None:
    assert held_out_examples(0, 5) == 0
    assert held_out_examples(4, 5) == held_out_examples(0.8, 5) == 4
    for given in (5, 0.95, 1.5, -1, -0.2):
        with pytest.raises(ValueError, match="must be a whole number below the 5 examples of train, or a fraction"):
            held_out_examples(given, 5)
    assert held_out_rows("auto") == held_out_rows(0) == 0
    assert held_out_rows(7) == 7
    with pytest.raises(ValueError, match="whose length is not known"):
        held_out_rows(0.5)


def test_one_is_a_number_of_examples_and_less_a_share() -> None:
    assert [held_out_examples(size, 10) for size in (0, 0.01, 0.5, 0.85, 1, 1.0, 9)] == [0, 1, 5, 9, 1, 1, 9]
