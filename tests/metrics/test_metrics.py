from __future__ import annotations

import math

import pytest

from milora_lightning.metrics import AnswerAccuracy, extract_answer, same_answer


def accuracy(generation: str, reference: str, **options: bool) -> float:
    metric = AnswerAccuracy(**options)
    metric.update([generation], [reference])
    return float(metric.compute())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1 + 1 = 2\nThe answer is: 2", "2"),
        ("THE ANSWER IS:2", "2"),
        ("The answer is:\n\n  2 apples \nBye 3", "2 apples"),
        ("The answer is: 1. No. The answer is: 2", "2"),
        ("#### 72", "72"),
        ("first 3, then 4/5", "4/5"),
        ("so $1,234.50 in total.", "$1,234.50"),
        ("12 - 5 = -7", "-7"),
        ("from 10-5", "5"),
        ("no number", None),
        ("The answer is:", None),
        ("", None),
    ],
)
def test_answer_is_read_after_the_last_marker_or_from_the_last_number(text, answer):
    assert extract_answer(text) == answer


def test_strict_reading_needs_the_marker():
    assert extract_answer("It is 2", strict=True) is None
    assert extract_answer("The answer is: 2", strict=True) == "2"


def test_marker_can_be_another():
    assert extract_answer("correct choice = b\nThe answer is: 2", pattern="correct choice =") == "b"


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("1,234.00", "1234"),
        ("1,234,567", "1234567"),
        ("$5", "5"),
        ("€5", "5.0"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("−5", "-5"),
        ("- 5", "-5"),
        ("50%", "50"),
        ("50 %", "50%"),
        ("7 apples", "7"),
        ("7 apples.", "7 pears"),
        ("7.", "7"),
        ("**7**.", "7"),
        ("$7$", "7"),
        ("x = 7", "7"),
        ("3/4", "0.75"),
        ("6 / 8", "3/4"),
        (".5", "1/2"),
        ("0.1", "1/10"),
        ("007", "7"),
        ("**true.**", "True"),
        (" Paris ", "paris"),
        ("(b)", "(B)"),
    ],
)
def test_forms_of_the_same_answer(answer, reference):
    assert same_answer(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("1,234", "1.234"),
        ("5", "-5"),
        ("10-5", "-5"),
        ("0.333", "1/3"),
        ("3/0", "3"),
        ("9007199254740993", "9007199254740992"),
        ("four", "4"),
        ("4", "four"),
        ("", "4"),
        ("9" * 5000, "9"),
        ("true", "false"),
        ("12", "1"),
        ("1.5", "1"),
    ],
)
def test_different_answers(answer, reference):
    assert not same_answer(answer, reference)


def test_generation_without_answer_is_wrong():
    assert accuracy("I do not know.", "4") == 0
    assert accuracy("", "") == 0
    assert accuracy("It is 4", "4") == 1
    assert accuracy("It is 4", "4", strict=True) == 0


@pytest.mark.parametrize("reference", ["10 - 3 = 7", "2 apples and 5 pears.", "2024-01-05", "3 to 4 days"])
def test_a_reference_of_several_numbers_is_a_text(reference):
    """Its first number is not the answer."""
    first = reference.split()[0][:4].rstrip("-")
    assert accuracy(f"I guess {first}", reference) == 0
    assert accuracy(reference.upper().rstrip("."), reference) == accuracy(f"The answer is: {reference}", reference) == 1
    assert accuracy(reference, reference, strict=True) == 0  # has no marker


def test_reference_may_be_a_whole_solution():
    assert accuracy("The answer is: 6", "2 * 3 = 6\nThe answer is: 6") == 1
    assert accuracy("The answer is: 6", "2 * 3 = 6\n#### 6") == 1
    assert accuracy("The answer is: 2", "2 * 3 = 6\n#### 6") == 0


GENERATIONS = ["The answer is: 1", "The answer is: 2", "3", "", "The answer is: yes", "The answer is: 6"]
REFERENCES = ["1", "5", "3", "4", "Yes", "-6"]


def test_batches_and_merged_states_equal_one_go():
    whole = AnswerAccuracy()
    whole.update(GENERATIONS, REFERENCES)
    assert whole.compute() == 0.5
    parts = AnswerAccuracy(), AnswerAccuracy()
    for part, batch in [(0, slice(0, 1)), (1, slice(1, 3)), (1, slice(3, 6))]:
        parts[part].update(GENERATIONS[batch], REFERENCES[batch])
    assert parts[1].compute() != whole.compute()
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == whole.compute()
    assert (parts[0].correct, parts[0].total) == (3, 6)


def test_states_are_summed_over_ranks():
    assert {fx.__name__ for fx in AnswerAccuracy()._reductions.values()} == {"dim_zero_sum"}
    assert all(not state.is_floating_point() for state in (AnswerAccuracy().correct, AnswerAccuracy().total))


def test_reset_forgets():
    metric = AnswerAccuracy()
    metric.update(["1"], ["1"])
    metric.reset()
    metric.update(["1"], ["2"])
    assert metric.compute() == 0


def test_nothing_counted_is_not_a_number():
    metric = AnswerAccuracy()
    metric.update([], [])
    assert math.isnan(metric.compute())


def test_lengths_have_to_match():
    with pytest.raises(ValueError, match="There are 1 generated texts but 2 references"):
        AnswerAccuracy().update(["1"], ["1", "2"])
