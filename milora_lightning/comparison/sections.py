"""The sections of a report, from which its Markdown and its HTML are generated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from milora_lightning.comparison.findings import Envelope, Finding, Margins, verdicts
from milora_lightning.comparison.measures import KL, PLACES, TOLD, Measure, parts, title_of
from milora_lightning.comparison.runs import Run, by_method
from milora_lightning.comparison.selection import at_edge, best_rate, mean_losses
from milora_lightning.comparison.statistics import DRAWS, Estimate, Judgement

_BETWEEN = "Its logarithm is linear in between, and it itself from 0 to the first validation. "


@dataclass(frozen=True)
class Section:
    """A heading, a text and a table.

    Attributes:
        title: The heading.
        text: Sentences.
        columns: Names of the columns; none if there is no table.
        rows: Rows of the table.
    """

    title: str
    text: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def in_short(
    reference: str, ends: Sequence[Finding], at: Mapping[str, Sequence[Finding]], area: Envelope | None
) -> Section:
    """Return the verdicts on all methods."""
    named = {f.measure.title: f for f in ends}
    for place, findings in at.items():
        named |= {f"{f.measure.title} at equal {_short(place)}": f for f in findings}  # the last level of each is kept
    if area is not None:
        named[area.finding.measure.title] = area.finding
    found = verdicts(named)
    columns = tuple(name for name in named if any(name in of for of in found.values()))
    rows = [(method, *(of.get(column, "") for column in columns)) for method, of in found.items()]
    return Section(
        "In short",
        f"Each method against {reference}. Nothing is called better, worse or equal that the tests below do not show; "
        "the rest is undecided. What is compared at equal loss or size is so at the last of the levels below.",
        ("method", *columns),
        tuple(rows),
    )


def results(runs: Sequence[Run]) -> Section:
    """Return the means and standard deviations before and after training."""
    groups = by_method(runs)
    measures = [m for m in TOLD if any(run.has(m.name) for run in runs)]
    first = {name: value for run in reversed(runs) for name, value in run.rows[0].items()}  # the same for all runs
    rows = [("before training", "", *(f"{first[m.name]:.4g}" if m.name in first else "" for m in measures))]
    for method, of in groups.items():
        values = [spread([run.last[m.name] for run in of]) if of[0].has(m.name) else "" for m in measures]
        rows.append((method, f"{of[0].learning_rate:g}", *values))
    return Section(
        "At each method's best rate",
        "Mean ± standard deviation over seeds, at the end of training. Losses are in nats per token, KL divergence and "
        "cross-entropy in nats per token of the held-out text.",
        ("method", "learning rate", *(m.title for m in measures)),
        tuple(rows),
    )


def by_part(runs: Sequence[Run]) -> Section | None:
    """Return the section on forgetting by text and by file of questions; None if there is at most one of each."""
    names = [name for name in parts(runs[0].last) if all(run.has(name) for run in runs)]
    if not names:
        return None
    first = runs[0].rows[0]
    rows = [("before training", *(f"{first[name]:.4g}" if name in first else "" for name in names))]
    for method, of in by_method(runs).items():
        rows.append((method, *(spread([run.last[name] for run in of]) for name in names)))
    text = "Mean ± standard deviation over seeds, at the end of training."
    return Section("Forgetting by text and task", text, ("method", *map(title_of, names)), tuple(rows))


def differences(reference: str, ends: Sequence[Finding], margins: Margins, seeds: int) -> Section:
    """Return the differences from the reference at the end of training, with their judgements."""
    relative = [f.measure.title for f in ends if f.measure.relative]
    ratios = f" ({' and '.join(relative)}: ratios)" if relative else ""
    alone = " One seed tells nothing of the spread between seeds, so that nothing can be decided." * (seeds == 1)
    return Section(
        f"Differences from {reference}",
        f"Paired by seed, with 95 % intervals over seeds and examples{ratios}. *better* and *worse*: p < 0.05 "
        "for no difference, after Holm's correction over the methods; *equal*: p < 0.05 for a difference beyond the "
        f"margin (TOST, likewise corrected), which is {margins.absolute:g} for losses (nats per token) and accuracies, "
        f"and {margins.ratio:.0%} for ratios; else *undecided*. The p-value is that of the verdict. "
        f"The variance over examples is of {DRAWS} draws, that "
        f"over seeds of {seeds}.{alone}",
        ("method", *(f.measure.title for f in ends)),
        _cells(ends),
    )


def equal_places(place: str, findings: Sequence[Finding], reference: str, methods: Sequence[str]) -> list[Section]:
    """Return a section for each measure, with values and differences at each level of the quantity that is equal."""
    sections = []
    for measure in dict.fromkeys(f.measure for f in findings):
        of_measure = [f for f in findings if f.measure == measure]
        levels = [f"{f.place[1]:.4g}" for f in of_measure if f.place is not None]
        rows = []
        lost = [method for method in methods if method not in of_measure[0].values]
        for method in of_measure[0].values:
            cells = [_valued(f, method) for f in of_measure]
            rows.append((method, *cells))
        sections.append(
            Section(
                f"{measure.title} at equal {PLACES[place]}",
                f"Interpolated on each run's trajectory where it first passes {levels[0]}, {levels[1]} and "
                f"{levels[2]}: half, three quarters and 95 % of the way from the start that all runs go. "
                + (_BETWEEN if measure.relative else "")
                + f"In brackets the {'ratio to' if measure.relative else 'difference from'} {reference}."
                + (f" Left out: {', '.join(lost)}, of which a run goes no part of that way." if lost else ""),
                ("method", *(f"{_short(place)} {level}" for level in levels)),
                tuple(rows),
            )
        )
    return sections


def lower_envelope(area: Envelope, reference: str, from_sweep: bool) -> Section:
    """Return the section on the mean lowest loss at equal forgetting, over all learning rates."""
    low, high = area.bounds
    finding = area.finding
    origin = "the sweep's runs, with the loss on the selection set" if from_sweep else "the reported runs"
    alone = max(map(len, finding.values.values())) == 1
    return Section(
        "Lower envelope of the plane",
        f"The lowest loss that a method reaches with any rate at a KL of at most k, averaged over log k from {low:.3g} "
        f"to {high:.3g}, which all methods cover; of {origin}, seed by seed. In brackets the difference from "
        f"{reference}." + (" One seed tells nothing of the spread between seeds, so that nothing is decided." * alone),
        ("method", "lowest loss at equal KL"),
        tuple((method, _valued(finding, method)) for method in finding.values),
    )


def sweeps(sweep: Sequence[Run], given: Sequence[float]) -> Section:
    """Return the section on the learning-rate sweep: its losses, and the growth of its grid."""
    groups = by_method(sweep)
    rates = sorted({run.learning_rate for run in sweep})
    rows, edges, added = [], [], []
    for method, runs in groups.items():
        best, losses = best_rate(runs), mean_losses(runs)
        rows.append((method, *(_loss(losses.get(rate), runs, rate, rate == best) for rate in rates)))
        edges += [method] if at_edge(runs) else []
        added += [f"{method} by {rate:g}" for rate in losses if rate not in given]
    seeds = sorted({run.seed for run in sweep})
    several = f"mean over the seeds {', '.join(map(str, seeds))}, none of which is reported"
    origin = several if len(seeds) > 1 else f"seed {seeds[0]}, which is not reported"
    text = (
        f"Loss on the selection set at the end{', and KL from the base' if sweep[0].has(KL) else ''}: {origin}, and on "
        "examples that are not reported either. The rate in brackets is taken."
    )
    if added:
        text += f" The grid was extended where the best rate lay at its edge: {', '.join(added)}."
    if edges:
        text += f" For {', '.join(edges)} the best is at the edge of the grid all the same: a wider one might suit it."
    return Section("Learning-rate sweep", text, ("method", *(f"{rate:g}" for rate in rates)), tuple(map(tuple, rows)))


def spread(values: Sequence[float], sign: str = "") -> str:
    """Format the mean and standard deviation.

    >>> spread([1.0, 2.0, 3.0]), spread([0.5], sign="+")
    ('2 ± 1', '+0.5')
    """
    if lost := sum(not math.isfinite(value) for value in values):
        return f"not finite in {lost} of {len(values)}"
    if len(values) == 1:
        return f"{values[0]:{sign}.4g}"
    return f"{mean(values):{sign}.4g} ± {stdev(values):.2g}"


def _cells(findings: Sequence[Finding]) -> tuple[tuple[str, ...], ...]:
    methods = findings[0].judgements if findings else {}
    return tuple((m, *(judged(f.measure, f.estimates[m], f.judgements[m]) for f in findings)) for m in methods)


def judged(measure: Measure, difference: Estimate, judgement: Judgement) -> str:
    """Format a difference, its interval, its p-value and the verdict.

    >>> from milora_lightning.comparison.measures import JUDGED
    >>> judged(JUDGED[0], Estimate(-0.05, 0.01, 8), Judgement("better", 0.001, 1.0))
    '−0.05 (−0.0731 to −0.0269), p = 0.001: better'
    """
    low, high = difference.interval()
    values = [difference.value, low, high]
    if measure.relative:
        texts = [f"×{math.exp(min(value, 700)):.3g}" if math.isfinite(value) else "?" for value in values]
    else:
        texts = [f"{value:+.3g}".replace("-", "−") if math.isfinite(value) else "?" for value in values]
    inside = f" ({texts[1]} to {texts[2]})" if math.isfinite(low) else ""
    shown = judgement.p_equal if judgement.verdict == "equal" else judgement.p_different
    p = (f", p = {shown:.2g}" if shown >= 1e-4 else ", p < 0.0001") if math.isfinite(low) else ""
    return f"{texts[0]}{inside}{p}: {judgement.verdict}"


def _valued(finding: Finding, method: str) -> str:
    text = spread(finding.values[method])
    if method not in finding.judgements:
        return text
    return f"{text} [{judged(finding.measure, finding.estimates[method], finding.judgements[method])}]"


def _loss(loss: float | None, runs: Sequence[Run], rate: float, chosen: bool) -> str:
    if loss is None:
        return ""
    kl = np.mean([run.last[KL] for run in runs if run.learning_rate == rate]) if runs[0].has(KL) else None
    text = (f"{loss:.4f}" if math.isfinite(loss) else "diverged") + ("" if kl is None else f", {kl:.3g}")
    return f"[{text}]" if chosen else text


def _short(place: str) -> str:
    return PLACES[place].partition(" of ")[0].partition(",")[0]


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
        title: Its title.
        setting: The settings of the runs, as a sentence.
        sections: The tables with their explanations.
        runs: The reported runs.
        sweep: The runs of the learning-rate sweep.
    """

    title: str
    setting: str
    sections: list[Section]
    runs: list[Run]
    sweep: list[Run]
