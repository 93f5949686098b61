"""Writing the report of finished runs: Markdown, HTML, plots and a table of all numbers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from milora_lightning.analysis.plots import new_figure
from milora_lightning.comparison import sections
from milora_lightning.comparison.findings import Margins, at_the_end, envelope, places
from milora_lightning.comparison.measures import KL
from milora_lightning.comparison.page import write_page
from milora_lightning.comparison.runs import Run, by_method, write_rows
from milora_lightning.comparison.sections import Report
from milora_lightning.comparison.selection import LOSS
from milora_lightning.utils.counting import counted
from milora_lightning.utils.markdown import table


def write_report(
    folder: Path,
    runs: Sequence[Run],
    sweep: Sequence[Run],
    config: Any,
    reference: str,
    margins: Margins,
    given: Sequence[float],
) -> None:
    """Write results.csv, report.md, report.html and the plots of finished runs.

    Args:
        folder: The folder to write to.
        runs: The runs to report.
        sweep: The runs of the learning-rate sweep.
        config: Configuration of one of the runs.
        reference: The method that the others are compared with.
        margins: What counts as no difference.
        given: The learning rates that the user gave.
    """
    stages = [*(("comparison", run) for run in runs), *(("sweep", run) for run in sweep)]
    write_rows(
        folder / "results.csv",
        [
            {"stage": stage, "method": r.method, "learning_rate": r.learning_rate, "seed": r.seed, **r.last}
            for stage, r in stages
        ],
    )
    report = make_report(runs, sweep, _setting(runs, config), reference, margins, given)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    write_page(folder / "report.html", report)
    groups = by_method(runs)
    plot_curves(folder / "learning_curves.png", groups)
    if runs[0].has(KL):
        plot_plane(folder / "learning_forgetting.png", groups)


def make_report(
    runs: Sequence[Run], sweep: Sequence[Run], setting: str, reference: str, margins: Margins, given: Sequence[float]
) -> Report:
    """Derive the findings from the runs, and describe them."""
    groups = by_method(runs)
    parts = [sections.results(runs), *filter(None, [sections.by_part(runs)])]
    if len(groups) > 1:
        ends, at = at_the_end(runs, reference, margins), places(runs, reference, margins)
        area = envelope(runs, sweep, reference, margins)
        parts.insert(0, sections.in_short(reference, ends, at, area))
        parts.append(sections.differences(reference, ends, margins, len({run.seed for run in runs})))
        for place, findings in at.items():
            parts += sections.equal_places(place, findings, reference, list(groups))
        if area is not None:
            parts.append(sections.lower_envelope(area, reference, bool(sweep)))
    if sweep:
        parts.append(sections.sweeps(sweep, given))
    return Report("Comparison of " + ", ".join(groups), setting, parts, list(runs), list(sweep))


def markdown(report: Report) -> str:
    """Write a report in Markdown that refers to the plots next to it."""
    parts = [f"# {report.title}", report.setting]
    for section in report.sections:
        parts += [f"## {section.title}", section.text]
        parts += [table(section.columns, section.rows)] if section.columns else []
        if section is report.sections[0]:
            parts.append("![Validation loss against steps](learning_curves.png)")
            if report.runs[0].has(KL):
                parts.append("![Validation loss against forgetting](learning_forgetting.png)")
    return "\n\n".join(parts) + "\n"


def plot_curves(path: Path, groups: dict[str, list[Run]]) -> None:
    """Plot the validation loss against steps: the mean and range over seeds, at the steps that all of these have."""
    with new_figure(path, 6, 4) as figure:
        axes = figure.add_subplot(xlabel="optimizer step", ylabel="validation loss")
        for method, runs in groups.items():
            courses = [{row["step"]: row[_loss(run)] for row in run.rows} for run in runs]
            # Runs that a callback or max_time ends need not have as many validations.
            steps = sorted(set.intersection(*map(set, courses)))
            losses = [[course[step] for course in courses] for step in steps]
            (line,) = axes.plot(steps, [mean(each) for each in losses], marker=".", label=method)
            bounds = [min(each) for each in losses], [max(each) for each in losses]
            axes.fill_between(steps, *bounds, color=line.get_color(), alpha=0.2, lw=0)
        axes.legend()


def plot_plane(path: Path, groups: dict[str, list[Run]]) -> None:
    """Plot the trajectory of every run: validation loss against KL divergence."""
    with new_figure(path, 6, 4.5) as figure:
        axes = figure.add_subplot(xlabel="KL from the base on held-out text (nats per token)", ylabel="validation loss")
        for number, (method, runs) in enumerate(groups.items()):
            for run in runs:
                x, y = run.course(KL), run.course(_loss(run))
                axes.plot(x, y, color=f"C{number}", lw=0.8, alpha=0.7, marker=".", ms=3)
                axes.plot(x[-1], y[-1], color=f"C{number}", marker="o", ls="", label=method if run is runs[0] else None)
        axes.legend(title="end of training")


def _loss(run: Run) -> str:
    return LOSS if run.has(LOSS) else "val_loss"


def _setting(runs: Sequence[Run], config: Any) -> str:
    seeds = len({run.seed for run in runs})
    minutes = mean(run.last["seconds"] for run in runs) / 60
    source = config.data.source
    batch = config.data.get("global_batch_size") or config.data.batch_size or 16
    parts = [f"{len(runs[0].examples[LOSS].index)} reported examples"] if LOSS in runs[0].examples else []
    parts += [f"{counted(seeds, 'seed')}"]
    return (
        f"Model `{config.model.name_or_path}` ({config.model.dtype}), data `{source.class_path.rpartition('.')[2]}`, "
        f"r = {config.adapter.r}, {counted(int(runs[0].last['step']), 'optimizer step')}, batch size {batch}, "
        f"{', '.join(parts)}; {minutes:.1f} minutes a run. Each run's whole configuration is in its folder. "
        f"milora-lightning {version('milora-lightning')}, torch {version('torch')}, {date.today()}."
    )
