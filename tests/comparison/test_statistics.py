"""Statistics of comparisons: against known values, and against draws whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from milora_lightning.comparison.statistics import (
    Array,
    Estimate,
    draw_counts,
    estimate,
    holm,
    judge,
    weighted_means,
)


def test_without_examples_the_estimate_is_students_paired_test() -> None:
    a, b = np.array([0.50, 0.47, 0.55, 0.52]), np.array([0.48, 0.41, 0.54, 0.47])
    found, truth = estimate(a - b), stats.ttest_rel(a, b)
    assert found.p_different() == pytest.approx(truth.pvalue)
    assert found.interval() == pytest.approx(tuple(truth.confidence_interval(0.95)))


def test_equivalence_is_two_one_sided_tests() -> None:
    differences = np.array([0.004, -0.002, 0.003, 0.001, 0.000])
    for margin in (0.005, 0.001):
        below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
        above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
        assert estimate(differences).p_equal(margin) == pytest.approx(max(below, above))


def test_holm_steps_down_and_never_falls() -> None:
    assert holm([0.005, 0.011, 0.02, 0.04, 0.13]) == pytest.approx([0.025, 0.044, 0.06, 0.08, 0.13])
    assert holm([0.13, 0.005]) == pytest.approx([0.13, 0.01])  # in the order of the input
    assert holm([0.03, 0.031, 0.9]) == pytest.approx([0.09, 0.09, 0.9])
    assert holm([]) == []


def test_a_draw_of_examples_is_averaged_as_if_they_were_repeated() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(3, 7)), rng.integers(1, 5, size=7).astype(float)
    counts = draw_counts(7, 4)
    for number, row in enumerate(counts):
        repeated = np.repeat(np.arange(7), row.astype(int))
        expected = [np.average(each[repeated], weights=weights[repeated]) for each in values]
        assert weighted_means(values, weights, counts)[number] == pytest.approx(expected)
    assert weighted_means(values, weights) == pytest.approx(np.average(values, axis=1, weights=weights))
    assert (draw_counts(7, 4) == counts).all()


def drawn(rng: np.random.Generator, seeds: int, examples: int, of_seeds: float, of_examples: float) -> Estimate:
    """The estimate of a difference of zero, which varies by seed, by example, and by both."""
    noise = rng.normal(size=(seeds, examples)) * of_examples
    values: Array = of_seeds * rng.normal(size=(seeds, 1)) + of_examples * rng.normal(size=examples) + noise
    resampled = weighted_means(values, np.ones(examples), draw_counts(examples, 100, int(rng.integers(2**31))))
    return estimate(values.mean(1), resampled, examples)


@pytest.mark.parametrize(
    ("of_seeds", "of_examples"),
    [(1.0, 1.0), (0.1, 1.0), (0.0, 1.0), (0.3, 2.0)],
    ids=["seeds", "both", "none", "mixed"],
)
@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, of_seeds: float, of_examples: float) -> None:
    rng = np.random.default_rng(1)
    found = [drawn(rng, seeds, 60, of_seeds, of_examples).interval() for _ in range(250)]
    assert np.mean([low <= 0 <= high for low, high in found]) >= 0.93


def test_intervals_over_seeds_or_examples_alone_would_promise_too_much() -> None:
    """The negative control of the test above."""
    rng = np.random.default_rng(1)
    hits: dict[str, list[bool]] = {"seeds": [], "examples": []}
    for _ in range(300):
        values = 0.3 * rng.normal(size=(3, 1)) + rng.normal(size=60) + 2 * rng.normal(size=(3, 60))
        pooled = values.std() / np.sqrt(values.size)
        hits["examples"].append(abs(values.mean()) < 1.96 * pooled)
        hits["seeds"].append(abs(values.mean()) < 1.96 * values.mean(1).std() / np.sqrt(3))
    assert np.mean(hits["examples"]) < 0.85
    assert np.mean(hits["seeds"]) < 0.85


def test_verdicts() -> None:
    sure, vague = (Estimate(-0.05, 0.005, 8), Estimate(-0.002, 0.001, 8)), Estimate(-0.05, 0.05, 8)
    found = [j.verdict for j in judge([*sure, vague], margin=0.01, lower_is_better=True)]
    assert found == ["better", "equal", "undecided"]
    assert judge([sure[0]], 0.01, lower_is_better=False)[0].verdict == "worse"
    assert judge([sure[1]], 0.001, lower_is_better=True)[0].verdict == "undecided"


def test_a_difference_within_the_margin_is_equal_even_if_it_is_surely_not_zero() -> None:
    (found,) = judge([Estimate(-0.002, 0.0001, 8)], 0.01, lower_is_better=True)
    assert found.p_different < 1e-6
    assert found.verdict == "equal"


def test_the_number_of_methods_raises_the_bar() -> None:
    one = Estimate(-0.05, 0.02, 20)
    assert judge([one], 0.01, True)[0].verdict == "better"
    many = judge([one, *[Estimate(0.0, 0.02, 20)] * 5], 0.01, True)
    assert many[0].verdict == "undecided"


def test_the_number_of_methods_raises_the_bar_for_equality_too() -> None:
    one = Estimate(0.0, 0.005, 20)
    assert judge([one], 0.01, True)[0].verdict == "equal"
    assert {each.verdict for each in judge([one] * 6, 0.01, True)} == {"undecided"}


def test_seeds_that_agree_leave_students_interval_over_examples() -> None:
    resampled = np.random.default_rng(0).normal(size=(200, 3))
    found = estimate(np.full(3, 0.25), resampled, 40)
    error = resampled.mean(1).std(ddof=1)
    assert found.interval() == pytest.approx(stats.t.interval(0.95, 39, 0.25, error))
    assert found.p_different() == pytest.approx(2 * stats.t.sf(0.25 / error, 39), rel=1e-6)


def test_one_seed_decides_nothing_and_identical_runs_are_equal() -> None:
    assert judge([estimate(np.array([-3.0]))], 0.01, True)[0].verdict == "undecided"
    assert judge([estimate(np.zeros(3))], 0.01, True)[0].verdict == "equal"
    assert judge([estimate(np.array([0.1, np.nan, 0.1]))], 0.01, True)[0].verdict == "undecided"


@pytest.mark.parametrize(("examples", "verdict"), [(20, "undecided"), (2000, "equal")])
def test_answers_that_are_all_wrong_show_equality_only_if_there_are_many(examples: int, verdict: str) -> None:
    """Of 20 wrong ones, a method may still answer 14 % of all others rightly."""
    right = weighted_means(np.zeros((3, examples)), np.ones(examples), draw_counts(examples, 50))
    found = estimate(np.zeros(3), right, examples, are_shares=True)
    assert judge([found], 0.01, lower_is_better=False)[0].verdict == verdict
    assert found.interval()[1] * examples == pytest.approx(2.8, abs=0.2)  # exactly, 3.7 of many
    assert judge([estimate(np.zeros(3), right, examples)], 0.01, False)[0].verdict == "equal"  # as losses would be
