"""The two rules of scoring GSM8K and MATH, on answers whose truth is known, each disagreement with its reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from milora_lightning.data import Math
from milora_lightning.metrics import right_expression, right_number, same_latex


class Pair(NamedTuple):
    """A line of pairs.txt; ``¶`` stands for a line break, and an answer after "!" is a whole generation."""

    task: str
    answer: str
    reference: str
    right: str  # whether a reader calls it right: y or n
    own: str  # by the package's rule
    metamath: str  # by that of the paper's scripts
    reason: str  # why the two rules disagree, or one of them with the reader

    @property
    def generation(self) -> str:
        answer = self.answer.replace("¶", "\n")
        return answer[1:] if answer.startswith("!") else f"So we get it.\nThe answer is: {answer}"


PAIRS = [Pair(*line.split("|")) for line in (Path(__file__).parent / "pairs.txt").read_text("utf-8").splitlines()]


def judged(source: Math, pairs: list[Pair]) -> list[tuple[str, ...]]:
    metric = source.metric()
    found = []
    for pair in pairs:
        metric.reset()
        metric.update([pair.generation], [pair.reference], [pair.task])
        results = metric.compute()
        found.append(tuple("ny"[int(results[name])] for name in ("accuracy", "accuracy_metamath")))
    return found


@pytest.fixture(scope="module")
def verdicts() -> list[tuple[str, ...]]:
    return judged(Math(), PAIRS)


def test_gsm8k_is_judged_alone_as_it_is_beside_math(verdicts: list[tuple[str, ...]]) -> None:
    own = [(pair, verdict) for pair, verdict in zip(PAIRS, verdicts, strict=True) if pair.task == "gsm8k"]
    assert judged(Math(math=None), [pair for pair, _ in own]) == [verdict for _, verdict in own]
    assert len({verdict for _, verdict in own}) == 4


def test_both_rules_judge_as_the_table_says(verdicts: list[tuple[str, ...]]) -> None:
    different = [
        (pair.answer, pair.reference, verdict)
        for pair, verdict in zip(PAIRS, verdicts, strict=True)
        if verdict != (pair.own, pair.metamath)
    ]
    assert not different
    assert len(PAIRS) >= 150
    assert len({(pair.task, pair.answer, pair.reference) for pair in PAIRS}) == len(PAIRS)


def test_each_disagreement_has_a_reason() -> None:
    assert all(bool(pair.reason) == (len({pair.right, pair.own, pair.metamath}) > 1) for pair in PAIRS)


def test_the_packages_rule_follows_the_reader_but_for_known_limits() -> None:
    assert all((pair.own != pair.right) == pair.reason.startswith("known limit") for pair in PAIRS)
    assert sum(pair.own != pair.right for pair in PAIRS) <= 3
    wrong = Counter((pair.right, pair.metamath) for pair in PAIRS)
    assert wrong["y", "n"] > 40  # what the paper's rule misses
    assert wrong["n", "y"] > 10  # and what it lets pass


def test_generated_text_is_never_executed(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    attack = f"__import__('pathlib').Path('{touched}').touch()"
    for answer in (attack, f"[{attack}]", f"1+{attack}", f"({attack},1)"):
        right_expression(f"The answer is: {answer}", "(1,1)")
        right_number(f"The answer is: {answer}", "1")
        Math().metric().update([f"The answer is: {answer}"], ["(1,1)"], ["math"])
    assert not touched.exists()


@pytest.mark.parametrize(
    "answer", ["9" * 5000, "1e999999", "2**9**9**9**9", "9^9^9^9", "9/0", "(" * 5000, "\\frac" * 900]
)
def test_any_answer_gets_a_verdict(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milora_lightning.metrics.latex.SECONDS", 1)
    metric = Math().metric()
    metric.update([f"The answer is: {answer}"] * 2, ["3", "3"], ["gsm8k", "math"])
    assert metric.compute()["accuracy"] == 0


@pytest.mark.parametrize("answer", ["(1/2, 6/2)", "[0.5,3]"])
def test_members_are_compared_by_value_in_the_papers_rule(answer: str) -> None:
    assert right_expression(f"The answer is: {answer}", answer[0] + "0.5,3.0" + answer[-1])
    assert not right_expression(f"The answer is: {answer}", answer[0] + "0.5,4.0" + answer[-1])


@pytest.mark.parametrize(("answer", "right"), [("$X$", True), ("$ X. $", True), ("$$X.$$", True), ("$ $", False)])
def test_a_formulas_delimiters_and_full_stop_are_no_part_of_it(answer: str, right: bool) -> None:
    assert same_latex(answer, "X") == right
