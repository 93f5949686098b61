"""Comparing trajectories at the same point: at equal loss, at equal size, and by the best over all learning rates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from milora_lightning.comparison.statistics import Array

SHARES = (0.5, 0.75, 0.95)
"""Fractions of the range common to all runs at which trajectories are compared."""


def common_levels(courses: Sequence[Array], shares: Sequence[float] = SHARES) -> Array:
    """Choose values that all courses reach on their way down: fractions of the range of the shortest one.

    Args:
        courses: For each run a decreasing quantity, such as its loss: shape (..., validations), the first before
            training.
        shares: The fractions.

    Returns:
        The values, shape (shares, ...); NaN if a course never falls below the lowest start.

    >>> common_levels([np.array([2.0, 1.0, 1.2]), np.array([2.0, 0.5])], [0.5, 1.0])
    array([1.5, 1. ])
    """
    start = np.stack([course[..., 0] for course in courses]).min(0)
    reached = np.stack([np.nanmin(course, -1) for course in courses]).max(0)
    levels = np.multiply.outer(np.asarray(shares), reached - start) + start
    return np.asarray(np.where(reached < start, levels, np.nan))


def at_level(course: Array, values: Array, level: float | Array, logarithmic: bool) -> Array:
    """Interpolate values where a course first falls to a level.

    Args:
        course: The decreasing quantity, shape (..., validations).
        values: The values to interpolate, linearly in the course; same shape.
        level: The level, one for all or of shape (...). If a course does not reach it, the value at its lowest point is
            used.
        logarithmic: Whether to interpolate the logarithm of the values, where both are positive.

    Returns:
        The values, shape (...).

    >>> losses, kl = np.array([2.0, 1.0, 0.5]), np.array([0.0, 0.1, 0.4])
    >>> float(at_level(losses, kl, 0.75, logarithmic=True).round(6)), float(at_level(losses, kl, 1.5, True))
    (0.2, 0.05)
    """
    level = np.asarray(level)
    there = course <= level[..., None]
    index = np.where(there.any(-1), there.argmax(-1), np.nanargmin(course, -1))
    before = np.maximum(index - 1, 0)

    def pick(array: Array, at: np.ndarray[tuple[int, ...], np.dtype[np.intp]]) -> Array:
        return np.asarray(np.take_along_axis(array, at[..., None], -1)[..., 0])

    high, low = pick(course, before), pick(course, index)
    first, last = pick(values, before), pick(values, index)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(high > low, np.clip((high - level) / (high - low), 0, 1), 1.0)
        linear = first + share * (last - first)
        if not logarithmic:
            return np.asarray(linear)
        return np.asarray(np.where((first > 0) & (last > 0), first ** (1 - share) * last**share, linear))


def lowest_at(costs: Sequence[Array], losses: Sequence[Array], budgets: Array) -> Array:
    """Return the lowest loss on any of the trajectories at a cost within the budget.

    Args:
        costs: The other quantity to keep low, such as forgetting: shape (validations,) for each trajectory.
        losses: The losses at the same points.
        budgets: Positive budgets, shape (budgets,).

    Returns:
        Losses, shape (budgets,). Between two points of a trajectory, the loss is linear in the logarithm of the cost,
        or in the cost itself if that starts at zero. NaN if no point is within the budget.

    >>> lowest_at([np.array([0.1, 1.0])], [np.array([2.0, 1.0])], np.array([0.05, 0.1, 0.1**0.5, 2.0]))
    array([nan, 2. , 1.5, 1. ])
    """
    best = np.full(len(budgets), np.inf)
    for cost, loss in zip(costs, losses, strict=True):
        for place in range(len(cost)):
            best = np.where(cost[place] <= budgets, np.fmin(best, loss[place]), best)
        for a, b, of_a, of_b in zip(cost[:-1], cost[1:], loss[:-1], loss[1:], strict=True):
            low, high = min(a, b), max(a, b)
            if not low < high:
                continue
            at_low, at_high = (of_a, of_b) if a < b else (of_b, of_a)
            share = np.log(budgets / low) / np.log(high / low) if low > 0 else budgets / high
            between = (budgets > low) & (budgets < high)
            best = np.where(between, np.fmin(best, at_low + share * (at_high - at_low)), best)
    return np.where(np.isfinite(best), best, np.nan)


def envelope_bounds(costs: Sequence[Sequence[Array]]) -> tuple[float, float] | None:
    """Return the range of budgets covered by the trajectories of all methods; None if there is none.

    The lower one is the largest of the methods' smallest positive costs, the upper one the smallest of their largest.

    >>> envelope_bounds([[np.array([0.0, 0.1, 1.0])], [np.array([0.2, 3.0])]])
    (0.2, 1.0)
    """
    spent = [np.concatenate(list(each)) for each in costs]
    spent = [each[np.isfinite(each) & (each > 0)] for each in spent]
    if not spent or any(not len(each) for each in spent):
        return None
    low, high = max(float(each.min()) for each in spent), min(float(each.max()) for each in spent)
    return (low, high) if low < high else None


def mean_lowest(costs: Sequence[Array], losses: Sequence[Array], bounds: tuple[float, float]) -> float:
    """Average the lowest affordable loss over budgets, evenly in their logarithm: the area under the lower envelope.

    Args:
        costs: As for :func:`lowest_at`.
        losses: As for :func:`lowest_at`.
        bounds: The smallest and the largest budget.

    >>> round(mean_lowest([np.array([0.1, 1.0])], [np.array([2.0, 1.0])], (0.1, 1.0)), 6)
    1.5
    """
    budgets = np.geomspace(*bounds, 201)
    budgets[[0, -1]] = bounds
    lowest = lowest_at(costs, losses, budgets)
    return float(((lowest[1:] + lowest[:-1]) / 2).mean())
