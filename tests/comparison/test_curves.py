"""Trajectories at equal loss and at any rate."""

from __future__ import annotations

import numpy as np
import pytest

from milora_lightning.comparison.curves import at_level, common_levels, envelope_bounds, lowest_at, mean_lowest


def test_levels_are_passed_by_all_courses() -> None:
    courses = [np.array([2.0, 1.0, 0.4]), np.array([2.0, 1.2, 1.3]), np.array([2.0, np.nan, 1.1])]
    levels = common_levels(courses)
    assert levels == pytest.approx([2 - 0.5 * 0.8, 2 - 0.75 * 0.8, 2 - 0.95 * 0.8])
    assert np.isnan(common_levels([*courses, np.array([2.0, 2.5])])).all()  # one that never learns
    shifted = common_levels([np.stack([course, course + 0.3]) for course in courses])
    assert shifted[:, 1] == pytest.approx(np.array(levels) + 0.3)  # harder examples have other levels


def test_the_trajectory_of_a_power_law_is_interpolated_exactly() -> None:
    """The logarithm of KL is linear in the loss."""
    losses = np.array([3.0, 2.0, 1.0, 0.5])
    assert at_level(losses, np.exp(-2 * losses), 1.3, logarithmic=True) == pytest.approx(np.exp(-2.6))
    assert at_level(losses, -2 * losses, 1.3, logarithmic=False) == pytest.approx(-2.6)
    assert at_level(losses, -2 * losses, 1.3, logarithmic=True) == pytest.approx(-2.6)  # no logarithm: linear


def test_the_first_crossing_counts_and_what_is_not_reached_ends_at_the_lowest_point() -> None:
    losses, values = np.array([2.0, 1.0, 1.5, 0.5]), np.array([0.0, 1.0, 5.0, 9.0])
    assert at_level(losses, values, 1.2, False) == pytest.approx(0.8)
    assert at_level(losses, values, 0.1, False) == 9.0
    assert at_level(losses, values, 2.0, False) == 0.0
    many = at_level(np.stack([losses, losses]), np.stack([values, 2 * values]), 1.2, False)
    assert many == pytest.approx([0.8, 1.6])


def test_the_envelope_takes_the_better_of_two_rates_and_forgets_what_is_dominated() -> None:
    small = np.array([0.0, 0.01, 0.1]), np.array([2.0, 1.5, 1.2])
    large = np.array([0.0, 0.1, 10.0]), np.array([2.0, 1.0, 1.4])
    budgets = np.array([0.01, 0.1, 1.0, 10.0])
    both = lowest_at(*zip(small, large, strict=True), budgets)
    assert both == pytest.approx([1.5, 1.0, 1.0, 1.0])
    assert envelope_bounds([[small[0]], [large[0]]]) is None  # the one ends where the other begins
    assert mean_lowest([small[0], large[0]], [small[1], large[1]], (0.1, 10.0)) == pytest.approx(1.0)


def test_a_method_that_forgets_ten_times_less_has_its_envelope_lowered_by_as_much() -> None:
    kl, loss = np.geomspace(1e-3, 10, 20), np.linspace(2.0, 1.0, 20)  # a quarter of a nat per decade
    bounds = envelope_bounds([[kl], [kl / 10]])
    assert bounds == pytest.approx((1e-3, 1.0))
    assert bounds is not None
    gain = mean_lowest([kl], [loss], bounds) - mean_lowest([kl / 10], [loss], bounds)
    assert gain == pytest.approx(0.25, rel=1e-6)


def test_courses_that_start_apart_are_compared_where_all_have_begun() -> None:
    courses = [np.array([5.0, 3.0, 1.0]), np.array([2.0, 1.0, 0.5])]
    for given in (courses, courses[::-1]):
        assert common_levels(given, [0.0, 0.5, 1.0]).tolist() == [2.0, 1.5, 1.0]
