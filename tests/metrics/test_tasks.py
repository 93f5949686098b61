"""How each task's answers are read and scored: every form of answer, and generations scored by hand."""

from __future__ import annotations

import threading

import pytest
import torch

from milora_lightning.data import Commonsense, Math
from milora_lightning.metrics import (
    TaskAccuracy,
    extract_choice,
    extract_solution,
    right_choice,
    right_solution,
    same_latex,
)


@pytest.mark.parametrize(
    ("text", "reference", "choice"),
    [
        ("the correct answer is true", "true", "true"),
        ("false. It is not true that", "true", "false"),
        ("the correct answer is solution2", "solution1", "solution2"),
        ("the correct answer is answer5", "answer1", "answer5"),
        ("answer1 or answer2", "answer2", "answer1"),
        ("ending4", "ending1", "ending4"),
        ("the correct answer is option1.", "option2", "option1"),
        ("answer12", "answer1", "answer1"),
        ("The correct answer is Answer1", "answer1", None),
        ("answer6", "answer1", None),
        ("answer 1", "answer1", None),
        ("it is true", "answer1", None),
        ("", "true", None),
    ],
)
def test_choice_is_the_first_word_of_the_references_kind(text: str, reference: str, choice: str | None) -> None:
    assert extract_choice(text, reference) == choice
    assert right_choice(text, reference) == (choice == reference)


def test_reference_may_be_a_sentence_but_has_to_name_a_choice() -> None:
    assert right_choice("option2", "the correct answer is option2")
    with pytest.raises(ValueError, match="'yes' names no choice"):
        right_choice("yes", "yes")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: $\\frac{1}{2}$.", "$\\frac{1}{2}$."),
        ("so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} and then \\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{3} The answer is: 4", "4"),
        ("\\boxed{3", None),
        ("The result is 3.", None),
        ("", None),
    ],
)
def test_solution_ends_in_the_marked_or_boxed_answer(text: str, answer: str | None) -> None:
    assert extract_solution(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("0.5", "\\frac{1}{2}"),
        ("\\frac12", "\\dfrac{1}{2}"),
        ("1/2", "\\frac{1}{2}"),
        ("1,234", "1234"),
        ("-\\frac{3}{4}", "-0.75"),
        ("50\\%", "50"),
        ("50%", "50\\%"),
        ("$\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("\\(7\\)", "7"),
        ("\\$18.90", "18.90"),
        ("7 \\text{ inches}", "7"),
        ("90^\\circ", "90"),
        ("x = 5", "5"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("x^2 + 2x + 1", "(x+1)^2"),
        ("\\{2, 1\\}", "\\{1, 2\\}"),
        ("-2, 1.5", "1.5,-2"),
        ("(1, 2)", "(1,2)"),
        ("[0,1)", "[0, 1)"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("\\text{even}", "\\text{even}"),
        ("2\\frac{1}{2}", "2.5"),
    ],
)
def test_forms_of_the_same_expression(answer: str, reference: str) -> None:
    assert same_latex(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("7x", "7"),
        ("-5", "5"),
        ("\\frac{1}{3}", "\\frac{1}{2}"),
        ("0.33", "\\frac{1}{3}"),
        ("(2,1)", "(1,2)"),
        ("[0,1]", "[0,1)"),
        ("(x-1)^2", "x^2+2x+1"),
        ("\\{1, 2, 3\\}", "\\{1, 2\\}"),
        ("\\text{odd}", "\\text{even}"),
        ("\\frac{1}{0}", "1"),
        ("", "3"),
        ("I do not know", "3"),
    ],
)
def test_different_expressions(answer: str, reference: str) -> None:
    assert not same_latex(answer, reference)


def test_endless_arithmetic_is_cut_off_and_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milora_lightning.metrics.latex.SECONDS", 1)
    assert not same_latex("9^{9^{9^{9}}}", "3")


def test_expressions_are_compared_off_the_main_thread_too() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.extend([same_latex("\\frac24", "0.5"), same_latex("3", "0.5")]))
    thread.start()
    thread.join()
    assert found == [True, False]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "milora-lightning\[math\]"'):
        Math().metric()
    with pytest.raises(ModuleNotFoundError, match="math-verify"):
        right_solution("The answer is: 3", "3")
    Math(math=None).metric()


# What small models write, and whether a reader calls it right by the benchmark's rules.
COMMONSENSE = [
    ("boolq", "the correct answer is true", "true", True),
    ("boolq", "the correct answer is false\n\nExplanation: It is true that", "true", False),
    ("boolq", "Yes, it does.", "true", False),
    ("piqa", "the correct answer is solution1", "solution2", False),
    ("piqa", "the correct answer is solution2 solution1 solution1", "solution2", True),
    ("social_i_qa", "the correct answer is answer2", "answer2", True),
    ("hellaswag", "the correct answer is ending3", "ending3", True),
    ("hellaswag", "He climbs up the ladder and begins to tear tiles off.", "ending3", False),
    ("winogrande", "the correct answer is option2", "option1", False),
    ("winogrande", "the correct answer is option", "option1", False),
    ("ARC-Easy", "the correct answer is answer4", "answer4", True),
    ("ARC-Challenge", "Answer: answer1", "answer1", True),
    ("ARC-Challenge", "the correct answer is 1", "answer1", False),
    ("openbookqa", "the correct answer is answer3, since plants need light", "answer3", True),
]
MATHS = [
    ("gsm8k", "She sold 48/2 = 24 clips in May.\n48 + 24 = 72.\nThe answer is: 72", "72", True),
    ("gsm8k", "It costs 3 * $400 = $1,200.\nThe answer is: $1,200.00", "1200", True),
    ("gsm8k", "Half of 21 is 10.5.\nThe answer is: 10 1/2", "10.5", True),
    ("gsm8k", "He loses 15 and gains 3.\nThe answer is: -12", "-12", True),
    ("gsm8k", "He loses 15 and gains 3.\nThe answer is: 12", "-12", False),
    ("gsm8k", "40/80 = 50%.\nThe answer is: 50%", "50", True),
    ("gsm8k", "The answer is: 3/4", "0.75", True),
    ("gsm8k", "Together they have 5 + 6 = 11 apples.", "11", False),  # no marker: the paper's rule
    ("gsm8k", "The answer is: 7 apples and 5 pears", "7", True),
    ("gsm8k", "The answer is: unknown", "7", False),
    ("gsm8k", "The answer is: 3. Wait. The answer is: 4", "3", False),
    ("math", "We get $x = \\frac{2}{4}$. The answer is: \\frac{1}{2}", "\\frac12", True),
    ("math", "Therefore the sum is $\\boxed{1{,}000}$.", "1000", True),
    ("math", "The answer is: $(3, -1)$", "(3,-1)", True),
    ("math", "The answer is: (-1, 3)", "(3,-1)", False),
    ("math", "The roots are -2 and 3. The answer is: $-2, 3$", "3,-2", True),
    ("math", "The answer is: 5x", "5", False),
    ("math", "So it is 12.", "12", False),
    ("math", "", "12", False),
]


@pytest.mark.parametrize(("source", "scored"), [(Commonsense(test="{task}.json"), COMMONSENSE), (Math(), MATHS)])
def test_agrees_with_generations_scored_by_hand(source: Commonsense | Math, scored: list) -> None:
    metric = source.metric()
    for task, generation, reference, right in scored:
        metric.reset()
        metric.update([generation], [reference], [task])
        assert metric.compute()["accuracy"] == right, generation
    metric.reset()
    tasks, generations, references, marks = zip(*scored, strict=True)
    metric.update(generations, references, tasks)
    results = metric.compute()
    for task in set(tasks):
        own = [mark for name, mark in zip(tasks, marks, strict=True) if name == task]
        assert results[f"accuracy/{task}"] == pytest.approx(sum(own) / len(own))
    means = [value for name, value in results.items() if name.startswith("accuracy/")]
    assert len(means) == len(set(tasks))
    assert results["accuracy"] == pytest.approx(sum(means) / len(means))


def test_merged_ranks_with_uneven_tasks_equal_one_process() -> None:
    tasks, generations, references, _ = zip(*COMMONSENSE, strict=True)
    source = Commonsense(test="{task}.json")
    whole, *ranks = (source.metric() for _ in range(3))
    whole.update(generations, references, tasks)
    cut = 2  # the first has seen one task, and not all of it
    for rank, part in zip(ranks, (slice(cut), slice(cut, None)), strict=True):
        rank.update(generations[part], references[part], tasks[part])
    assert ranks[1].compute()["accuracy/boolq"] != whole.compute()["accuracy/boolq"]
    ranks[0].merge_state(ranks[1])
    assert ranks[0].compute() == whole.compute()
    assert {fx.__name__ for fx in whole._reductions.values()} == {"dim_zero_sum"}


def test_unnamed_texts_count_as_one_more_task() -> None:
    metric = TaskAccuracy(dict.fromkeys(["", "a"], str.__eq__))
    metric.update(["x", "x", "y"], ["x", "y", "y"], ["", "", "a"])
    assert metric.compute() == {"accuracy": torch.tensor(0.75), "accuracy/a": torch.tensor(1.0)}


def test_unknown_tasks_and_unequal_lengths_are_refused() -> None:
    metric = TaskAccuracy({"a": str.__eq__})
    with pytest.raises(ValueError, match=r"no task 'b', only \['a'\]"):
        metric.update(["x"], ["x"], ["b"])
    with pytest.raises(ValueError, match="1 generated texts, 1 references and 2 tasks"):
        metric.update(["x"], ["x"], ["a", "a"])
