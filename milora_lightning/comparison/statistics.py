"""Differences between methods: standard errors, tests and verdicts.

These functions take arrays and return numbers, independently of runs and files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

Array = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "equal", "undecided"]

LEVEL = 0.05
"""The probability of a wrong claim: the level of tests after Holm's correction, and 1 minus that of intervals."""

LEAST = 1e-12
"""The smallest p-value that is distinguished from zero."""

DRAWS = 1000
"""Draws of examples for each standard error."""


@dataclass(frozen=True)
class Estimate:
    """A difference, with its standard errors over seeds and over examples.

    Each error has a separate Student's t distribution. The half-width of an interval is the root of the sum of both
    squared half-widths. This covers the true value at least as often as claimed, even if two or three seeds give a poor
    estimate of the spread; combined degrees of freedom (Satterthwaite) would claim too much there.

    Attributes:
        value: The difference, as the mean over seeds.
        error: Its standard error over seeds; NaN if there is only one seed.
        freedom: Degrees of freedom of ``error``: the number of seeds minus one.
        drawn: Its standard error over examples; 0 if they are not stored.
        drawn_freedom: Degrees of freedom of ``drawn``.
    """

    value: float
    error: float
    freedom: float
    drawn: float = 0.0
    drawn_freedom: float = 1.0

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the confidence interval at confidence 1 − ``level``; NaN if that is unknown.

        >>> low, high = Estimate(1.0, 0.5, 10).interval()
        >>> round(low, 3), round(high, 3)
        (-0.114, 2.114)
        """
        reach = self._reach(level / 2)
        return self.value - reach, self.value + reach

    def p_different(self) -> float:
        """Return the two-sided p-value for the hypothesis of no difference."""
        return min(1.0, 2 * self._beyond(abs(self.value)))

    def p_equal(self, margin: float) -> float:
        """Return the larger p-value of the two one-sided tests (TOST) that the difference lies within ±``margin``."""
        return max(self._beyond(margin - self.value), self._beyond(margin + self.value))

    def _reach(self, p: float) -> float:
        """Return the distance that the true value exceeds, on one side, with probability ``p``."""
        of_seeds = self.error * float(stats.t.isf(p, self.freedom))
        return math.hypot(of_seeds, self.drawn * float(stats.t.isf(p, self.drawn_freedom)))

    def _beyond(self, distance: float) -> float:
        if not np.isfinite([self.error, self.drawn, distance]).all():
            return 1.0
        if distance < 0:
            return 1 - self._beyond(-distance)
        if self.error == self.drawn == 0:  # all runs are identical
            return 0.0 if distance > 0 else 1.0
        if distance >= self._reach(LEAST):
            return LEAST
        if distance <= self._reach(0.5):  # none but for rounding
            return 0.5
        return float(optimize.brentq(lambda p: self._reach(p) - distance, LEAST, 0.5))


def estimate(
    differences: Array, resampled: Array | None = None, examples: int = 0, are_shares: bool = False
) -> Estimate:
    """Estimate the mean of differences between two methods that are paired by seed.

    The variance over seeds is s²/n of the differences. (A bootstrap over seeds would give the same times (n − 1)/n,
    which is too small and matters for three seeds.) The variance over examples comes from a bootstrap, with the same
    draws for all methods and seeds, because all runs are measured on the same examples.

    Args:
        differences: The difference for each seed, shape (seeds,).
        resampled: The differences on each draw of examples, shape (draws, seeds); None if examples are not stored.
        examples: The number of examples from which draws are made.
        are_shares: Whether the values are shares of examples that are right. Two examples are then added, of which each
            method gets one right (Bonett & Price, 2012). Without them, a few examples that all methods get wrong would
            prove these equal, because all draws are alike.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    value = float(values.mean())
    if n < 2 or not np.isfinite(values).all():
        return Estimate(value, float("nan"), float("nan"))
    error = float(values.std(ddof=1)) / math.sqrt(n)
    if resampled is None:
        return Estimate(value, error, n - 1.0)
    drawn = math.hypot(float(resampled.mean(1).std(ddof=1)), math.sqrt(2) / (examples + 2) if are_shares else 0.0)
    return Estimate(value, error, n - 1.0, drawn, max(1.0, examples - 1.0))


@functools.lru_cache(maxsize=16)
def draw_counts(examples: int, draws: int, seed: int = 0) -> Array:
    """Draw examples with replacement: how often each is in a draw, shape (draws, examples).

    The same arguments give the same draws, so all methods are measured on the same ones.

    >>> draw_counts(5, 2).sum(1)
    array([5., 5.])
    """
    generator = np.random.default_rng([seed, examples])
    return generator.multinomial(examples, np.full(examples, 1 / examples), size=draws).astype(np.float64)


def weighted_means(values: Array, weights: Array, counts: Array | None = None) -> Array:
    """Average over examples.

    Args:
        values: Value of each example, shape (validations, examples).
        weights: Weight of each example, such as its number of tokens, shape (examples,).
        counts: How often each example is in a draw, shape (draws, examples); None for no draws.

    Returns:
        The averages, shape (draws, validations) or (validations,).
    """
    if counts is None:
        return np.asarray(values @ weights / weights.sum())
    return np.asarray((counts @ (values * weights).T) / (counts @ weights)[:, None])


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests with Holm's stepwise method, which is at least as powerful as Bonferroni's.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(order))
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, (len(order) - place) * p_values[index])
        corrected[index] = min(1.0, largest)
    return [float(p) for p in corrected]


@dataclass(frozen=True)
class Judgement:
    """The verdict on a method, with both p-values after Holm's correction over the methods."""

    verdict: Verdict
    p_different: float
    p_equal: float


def judge(estimates: Sequence[Estimate], margin: float, lower_is_better: bool, level: float = LEVEL) -> list[Judgement]:
    """Judge the differences of several methods from one reference.

    A method is ``equal`` if its difference is shown to lie within the margin, even if it is certainly not zero;
    otherwise ``better`` or ``worse`` if the difference is shown to be nonzero; otherwise ``undecided``.

    Args:
        estimates: The difference of each method from the reference.
        margin: Differences up to this count as none; fixed before the results are seen.
        lower_is_better: Whether a negative difference is an advantage.
        level: The probability of a wrong claim about any of the methods, for each of the two kinds.
    """
    different = holm([e.p_different() for e in estimates])
    equal = holm([e.p_equal(margin) for e in estimates])
    return [
        Judgement(_verdict(e.value, p < level, q < level, lower_is_better), p, q)
        for e, p, q in zip(estimates, different, equal, strict=True)
    ]


def _verdict(value: float, different: bool, equal: bool, lower_is_better: bool) -> Verdict:
    if equal:
        return "equal"
    if not different:
        return "undecided"
    return "better" if (value < 0) == lower_is_better else "worse"
