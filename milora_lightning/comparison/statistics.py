"""Differences between methods: their standard errors, tests, and what may be said of them.

These functions take arrays and return numbers; they know nothing of runs and files.
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
"""The chance of a claim that is wrong: of tests after Holm's correction, and of what intervals leave out."""

LEAST = 1e-12
"""The smallest p-value that is told apart from zero."""

DRAWS = 1000
"""Draws of examples for each standard error."""


@dataclass(frozen=True)
class Estimate:
    """A difference, with its standard errors over seeds and over examples.

    Each has a Student's t distribution of its own. An interval reaches as far as the root of the sum of both squared
    reaches, which holds the truth at least as often as it says also where two or three seeds tell little of their
    spread; adding up degrees of freedom (Satterthwaite) would promise too much there.

    Attributes:
        value: The difference; of several seeds their mean.
        error: Its standard error over seeds; NaN if a single seed leaves it unknown.
        freedom: Degrees of freedom of that: the number of seeds less one.
        drawn: Its standard error over examples; 0 if they are not kept.
        drawn_freedom: Degrees of freedom of that.
    """

    value: float
    error: float
    freedom: float
    drawn: float = 0.0
    drawn_freedom: float = 1.0

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the interval that holds the true difference but for a chance of ``level``; NaN if that is unknown.

        >>> low, high = Estimate(1.0, 0.5, 10).interval()
        >>> round(low, 3), round(high, 3)
        (-0.114, 2.114)
        """
        reach = self._reach(level / 2)
        return self.value - reach, self.value + reach

    def p_different(self) -> float:
        """Return the chance of a difference as large as this one, in either direction, if there were none."""
        return min(1.0, 2 * self._beyond(abs(self.value)))

    def p_equal(self, margin: float) -> float:
        """Return the larger p-value of the two one-sided tests (TOST) that the difference lies within ±``margin``."""
        return max(self._beyond(margin - self.value), self._beyond(margin + self.value))

    def _reach(self, p: float) -> float:
        """Return the distance that a true value lies beyond, on one side, with a chance of ``p``."""
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
        return float(optimize.brentq(lambda p: self._reach(p) - distance, LEAST, 0.5))


def estimate(differences: Array, resampled: Array | None = None, examples: int = 0) -> Estimate:
    """Estimate the mean of differences between two methods that are paired by seed.

    Its variance over seeds is s²/n of the differences: drawing seeds again and again would come to the same, but for a
    factor of (n − 1)/n by which it is too small, which matters for three seeds. Its variance over examples is that on
    examples drawn anew with replacement: the same draw for all methods and seeds, as all runs are measured on the same
    examples.

    Args:
        differences: The difference for each seed, shape (seeds,).
        resampled: The differences on each draw of examples, shape (draws, seeds); None if examples are not kept.
        examples: The number of examples of which draws are made.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    value = float(values.mean())
    if n < 2 or not np.isfinite(values).all():
        return Estimate(value, float("nan"), float("nan"))
    error = float(values.std(ddof=1)) / math.sqrt(n)
    if resampled is None:
        return Estimate(value, error, n - 1.0)
    return Estimate(value, error, n - 1.0, float(resampled.mean(1).std(ddof=1)), max(1.0, examples - 1.0))


@functools.lru_cache(maxsize=16)
def draw_counts(examples: int, draws: int, seed: int = 0) -> Array:
    """Draw examples with replacement: how often each is in a draw, shape (draws, examples).

    The same arguments give the same draws, so that all methods are measured on the same ones.

    >>> draw_counts(5, 2).sum(1)
    array([5., 5.])
    """
    generator = np.random.default_rng([seed, examples])
    return generator.multinomial(examples, np.full(examples, 1 / examples), size=draws).astype(np.float64)


def weighted_means(values: Array, weights: Array, counts: Array | None = None) -> Array:
    """Average over examples.

    Args:
        values: Value of each example, shape (validations, examples).
        weights: How much each example counts, such as its number of tokens, shape (examples,).
        counts: How often each example is in a draw, shape (draws, examples); None for once, and no axis of draws.

    Returns:
        The averages, shape (draws, validations) or (validations,).
    """
    if counts is None:
        return np.asarray(values @ weights / weights.sum())
    return np.asarray((counts @ (values * weights).T) / (counts @ weights)[:, None])


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, as Holm does: stepwise, and not less powerful than Bonferroni's correction.

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
    """What may be said of a method: the verdict, with both p-values after Holm's correction over the methods."""

    verdict: Verdict
    p_different: float
    p_equal: float


def judge(estimates: Sequence[Estimate], margin: float, lower_is_better: bool, level: float = LEVEL) -> list[Judgement]:
    """Judge the differences of several methods from one reference.

    A method is ``equal`` if its difference is shown to lie within the margin, even one that is surely not zero; else
    ``better`` or ``worse`` if the difference is shown not to be zero; else ``undecided``.

    Args:
        estimates: The difference of each method from the reference.
        margin: What counts as no difference, fixed before the results were seen.
        lower_is_better: Whether a negative difference is an advantage.
        level: The chance of a wrong claim about any of the methods, of each of the two kinds.
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
