"""Findings of a comparison: each method's differences from the reference, at several points of the trajectories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from milora_lightning.comparison.curves import at_level, common_levels, envelope_bounds, mean_lowest
from milora_lightning.comparison.measures import EFFECT, JUDGED, KL, PLACES, SIZE, Measure
from milora_lightning.comparison.runs import Run, by_method
from milora_lightning.comparison.selection import LOSS, SELECTION_LOSS
from milora_lightning.comparison.statistics import Array, Estimate, Judgement, estimate, judge

Values = dict[str, dict[int, tuple[float, Array | None]]]
"""By method and seed: a value, and its values on draws of examples."""


@dataclass(frozen=True)
class Margins:
    """Differences that count as none: for losses and accuracies, and, as a ratio, for relative measures."""

    absolute: float
    ratio: float

    def of(self, measure: Measure) -> float:
        """Return the margin for a measure's differences, which are differences of logarithms if it is relative."""
        return float(np.log1p(self.ratio)) if measure.relative else self.absolute


@dataclass(frozen=True)
class Finding:
    """The methods' differences from the reference in one measure at one point.

    Attributes:
        measure: The measure; for relative ones, differences are of logarithms.
        place: The point: ``None`` for the end of training, otherwise the name and value of the quantity that is equal.
        values: By method, the value for each seed.
        estimates: The difference of each method other than the reference.
        judgements: The judgement of each difference.
    """

    measure: Measure
    place: tuple[str, float] | None
    values: dict[str, list[float]]
    estimates: dict[str, Estimate]
    judgements: dict[str, Judgement]


@dataclass(frozen=True)
class Envelope:
    """The mean over amounts of forgetting of the lowest loss at any learning rate of a method.

    Attributes:
        bounds: The smallest and largest amount.
        finding: The means and their differences.
    """

    bounds: tuple[float, float]
    finding: Finding


def compare_values(measure: Measure, values: Values, reference: str, margins: Margins, examples: int) -> Finding:
    """Compare the values of the methods with those of the reference, paired by seed.

    Args:
        measure: The measure of the values.
        values: Values by method and seed; seeds missing in the reference are ignored.
        reference: The method to compare with.
        margins: What counts as no difference.
        examples: Number of examples from which draws are made; 0 if there are none.
    """
    estimates = {}
    for method, by_seed in values.items():
        if method != reference:
            pairs = [(by_seed[seed], values[reference][seed]) for seed in by_seed if seed in values[reference]]
            difference = np.array([_minus(measure, a, b) for (a, _), (b, _) in pairs])
            drawn = [_minus(measure, a, b) for (_, a), (_, b) in pairs if a is not None and b is not None]
            whole = len(drawn) == len(pairs) and len(drawn) > 0
            resampled = np.stack(drawn, 1) if whole else None
            estimates[method] = estimate(difference, resampled, examples, measure.is_share)
    judged = judge(list(estimates.values()), margins.of(measure), measure.lower_is_better)
    plain = {method: [value for value, _ in by_seed.values()] for method, by_seed in values.items()}
    return Finding(measure, None, plain, estimates, dict(zip(estimates, judged, strict=True)))


def at_the_end(runs: Sequence[Run], reference: str, margins: Margins) -> list[Finding]:
    """Compare the methods in all measures that every run has at the end of training."""
    return [
        compare_values(measure, _values(runs, measure.name, _last), reference, margins, _examples(runs, measure.name))
        for measure in JUDGED
        if all(run.has(measure.name) for run in runs)
    ]


def at_equal(place: str, runs: Sequence[Run], reference: str, margins: Margins) -> list[Finding]:
    """Compare trajectories where they first have the same loss, or the same size of their updates.

    Args:
        place: The quantity that is equal, one of :data:`PLACES`; its levels are chosen by
            :func:`milora_lightning.comparison.curves.common_levels`.
        runs: The runs. Methods with one that goes no step of the way, as if it diverged at once, are left out.
        reference: The method to compare with.
        margins: What counts as no difference.

    Returns:
        A finding for each level and each measure that was taken at every validation; none if there are no levels.
    """
    sign = -1.0 if place in (SIZE, EFFECT) else 1.0  # sizes grow, and levels are passed on the way down
    if not all(_is_whole(run, place) for run in runs):
        return []
    lost = {run.method for run in runs if not np.nanmin(sign * run.course(place)) < sign * run.course(place)[0]}
    runs = [run for run in runs if run.method not in lost]
    if reference in lost or len({run.method for run in runs}) < 2:
        return []
    levels = common_levels([sign * run.course(place) for run in runs])
    # On a draw of examples, the same rule gives other levels: harder examples have larger losses throughout.
    drawn_levels = common_levels([sign * run.draws(place) for run in runs])
    measured = [m for m in JUDGED if m.name != place and (m.is_forgetting or m.name == LOSS)]
    found = []
    for measure in measured:
        if not all(_is_whole(run, measure.name) for run in runs) or not np.isfinite(levels).all():
            continue
        for level, drawn_level in zip(levels.tolist(), drawn_levels, strict=True):

            def taken(
                course: Array, values: Array, drawn: bool, at: tuple[float, Array] = (level, drawn_level)
            ) -> Array:
                wanted = np.broadcast_to(at[1], course.shape[:-1]) if drawn else at[0]
                return at_level(sign * course, values, wanted, measure.relative)  # noqa: B023 (called at once)

            values = _values(runs, measure.name, taken, place)
            size = min(_examples(runs, measure.name) or 2**31, _examples(runs, place) or 2**31)
            finding = compare_values(measure, values, reference, margins, size)
            found.append(Finding(measure, (place, sign * level), finding.values, finding.estimates, finding.judgements))
    return found


def envelope(runs: Sequence[Run], sweep: Sequence[Run], reference: str, margins: Margins) -> Envelope | None:
    """Compare the lower envelopes of all trajectories of a method in the plane of forgetting (KL) and loss.

    The trajectories are those of the sweep, with the loss on the selection set; without a sweep, of the reported runs.
    They are compared seed by seed.

    Returns:
        None if forgetting was not measured, or the methods have no amounts of it in common.
    """
    trajectories, name = (sweep, SELECTION_LOSS) if sweep else (runs, LOSS)
    if not all(_is_whole(run, KL) and _is_whole(run, name) for run in trajectories):
        return None
    groups = by_method(trajectories)
    bounds = envelope_bounds([[run.course(KL) for run in of] for of in groups.values()])
    if bounds is None:
        return None
    values: Values = {}
    for method, of in groups.items():
        for seed in dict.fromkeys(run.seed for run in of):
            of_seed = [run for run in of if run.seed == seed]
            area = mean_lowest([run.course(KL) for run in of_seed], [run.course(name) for run in of_seed], bounds)
            values.setdefault(method, {})[seed] = (area, None)
    measure = Measure(name, "lowest loss at equal KL")
    return Envelope(bounds, compare_values(measure, values, reference, margins, 0))


def places(runs: Sequence[Run], reference: str, margins: Margins) -> dict[str, list[Finding]]:
    """Compare trajectories at every possible point; see :func:`at_equal`."""
    return {place: found for place in PLACES if (found := at_equal(place, runs, reference, margins))}


def _last(course: Array, values: Array, drawn: bool) -> Array:
    return np.asarray(values[..., -1])


def _values(
    runs: Sequence[Run], name: str, take: Callable[[Array, Array, bool], Array], place: str | None = None
) -> Values:
    """Take a value from each run's trajectory, as measured and on draws of its examples."""
    values: Values = {}
    for run in runs:
        course = run.course(place or name)
        value = float(take(course, run.course(name), False))
        drawn = None
        if name in run.examples or place in run.examples:
            of_place, of_values = np.broadcast_arrays(run.draws(place or name), run.draws(name))
            drawn = take(of_place, of_values, True)
        values.setdefault(run.method, {})[run.seed] = value, drawn
    return values


def _examples(runs: Sequence[Run], name: str) -> int:
    """Return the number of examples that a result averages over; 0 if they are not stored."""
    return min((len(run.examples[name].index) for run in runs if name in run.examples), default=0)


def _is_whole(run: Run, name: str) -> bool:
    """Return whether a result was measured at every validation, and is finite up to where a run may have diverged."""
    return bool(np.isfinite(run.course(name)[0])) and not any(name not in row for row in run.rows)


def _minus(measure: Measure, a: float | Array, b: float | Array) -> Array:
    if measure.relative:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.log(a) - np.log(b))
    return np.asarray(a - np.asarray(b))


def verdicts(findings: Mapping[str, Finding]) -> dict[str, dict[str, str]]:
    """Return the verdict on each method by the name of each finding."""
    methods = dict.fromkeys(m for finding in findings.values() for m in finding.judgements)
    return {
        method: {name: f.judgements[method].verdict for name, f in findings.items() if method in f.judgements}
        for method in methods
    }
