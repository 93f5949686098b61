"""The report of ``compare``: tables, learning curves, and learning against forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from milora_lightning.analysis.plots import new_figure
from milora_lightning.cli.runs import Row, Run, best_rate, write_rows
from milora_lightning.data.shared_steps import BATCH
from milora_lightning.utils.counting import counted
from milora_lightning.utils.markdown import table

NAMES = {
    "val_loss": "validation loss",
    "val_accuracy": "accuracy",
    "forgetting_kl": "KL from the base",
    "forgetting_cross_entropy": "cross-entropy with the base",
}
KL = "forgetting_kl"


def write_report(folder: Path, runs: Sequence[Run], sweep: Sequence[Run], config: Any) -> None:
    """Write results.csv, report.md and the plots of finished runs.

    Args:
        folder: The folder to write to.
        runs: The runs to report.
        sweep: The runs of the learning-rate sweep.
        config: Configuration of one of the runs.
    """
    stages = [*(("comparison", run) for run in runs), *(("sweep", run) for run in sweep)]
    write_rows(
        folder / "results.csv",
        [
            {"stage": stage, "method": r.method, "learning_rate": r.learning_rate, "seed": r.seed, **r.last}
            for stage, r in stages
        ],
    )
    groups = by_method(runs)
    pictures = ["![Validation loss against steps](learning_curves.png)"]
    plot_curves(folder / "learning_curves.png", groups)
    if KL in runs[0].last:
        plot_plane(folder / "learning_forgetting.png", groups)
        pictures.append("![Validation loss against forgetting](learning_forgetting.png)")
    parts = [
        "# Comparison of " + ", ".join(groups),
        _setting(runs, config),
        results_table(groups),
        "Mean ± standard deviation over seeds, at the end of training. Losses are in nats per token of the responses, "
        "KL divergence and cross-entropy in nats per token of the held-out text.",
        *([paired_table(groups)] if len(groups) > 1 else []),
        *pictures,
        *([sweep_table(sweep)] if sweep else []),
    ]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by method, in the order of their first run."""
    return {name: [run for run in runs if run.method == name] for name in dict.fromkeys(r.method for r in runs)}


def results_table(groups: dict[str, list[Run]]) -> str:
    """Return the table of means and standard deviations before and after training."""
    first = next(iter(groups.values()))[0]
    columns = [name for name in NAMES if name in first.last]
    rows = [["before training", "", *(f"{first.rows[0][c]:.4g}" if c in first.rows[0] else "" for c in columns)]]
    for method, runs in groups.items():
        values = [spread([run.last[column] for run in runs]) for column in columns]
        rows.append([method, f"{runs[0].learning_rate:g}", *values])
    return table(["method", "learning rate", *(NAMES[c] for c in columns)], rows)


def paired_table(groups: dict[str, list[Run]]) -> str:
    """Return the differences from the first method, paired by seed, so that the order of the data is the same."""
    (reference, first), *others = groups.items()
    columns = [c for c in ("val_loss", "val_accuracy", KL) if c in first[0].last]
    rows = []
    for method, runs in others:
        pairs = list(zip(runs, first, strict=True))
        cells = []
        for column in columns:
            differences = [run.last[column] - other.last[column] for run, other in pairs]
            larger = sum(d > 0 for d in differences)
            cells.append(f"{spread(differences, sign='+')} (larger in {larger} of {len(differences)})")
        rows.append([method, *cells])
    return f"Difference from {reference} with the same seed:\n\n" + table(
        ["method", *(NAMES[c] for c in columns)], rows
    )


def sweep_table(sweep: Sequence[Run]) -> str:
    """Return the results of the learning-rate sweep, with a warning if the best rate is at the edge of the grid."""
    groups = by_method(sweep)
    rates = sorted({run.learning_rate for run in sweep})
    rows, at_edge = [], []
    for method, runs in groups.items():
        best = best_rate(runs)
        cells = {run.learning_rate: _losses(run.last, chosen=run.learning_rate == best) for run in runs}
        rows.append([method, *(cells[rate] for rate in rates)])
        at_edge += [method] if best in (rates[0], rates[-1]) else []
    measured = "Validation loss and KL from the base" if KL in sweep[0].last else "Validation loss"
    text = f"{measured} in the learning-rate sweep (seed {sweep[0].seed}):\n\n" + table(
        ["method", *(f"{rate:g}" for rate in rates)], rows
    )
    if at_edge:
        text += f"\n\nFor {', '.join(at_edge)} the best is at the edge of the grid: a wider one might suit it better."
    return text


def _losses(row: Row, chosen: bool) -> str:
    loss = f"{row['val_loss']:.4f}"
    return (f"**{loss}**" if chosen else loss) + (f", {row[KL]:.3g}" if KL in row else "")


def spread(values: Sequence[float], sign: str = "") -> str:
    """Format the mean and standard deviation.

    >>> spread([1.0, 2.0, 3.0]), spread([0.5], sign="+")
    ('2 ± 1', '+0.5')
    """
    if len(values) == 1:
        return f"{values[0]:{sign}.4g}"
    return f"{mean(values):{sign}.4g} ± {stdev(values):.2g}"


def plot_curves(path: Path, groups: dict[str, list[Run]]) -> None:
    """Plot the validation loss against steps: the mean and range over seeds."""
    with new_figure(path, 6, 4) as figure:
        axes = figure.add_subplot(xlabel="optimizer step", ylabel=NAMES["val_loss"])
        for method, runs in groups.items():
            steps = [row["step"] for row in runs[0].rows]
            losses = list(zip(*([row["val_loss"] for row in run.rows] for run in runs), strict=True))
            (line,) = axes.plot(steps, [mean(each) for each in losses], marker=".", label=method)
            bounds = [min(each) for each in losses], [max(each) for each in losses]
            axes.fill_between(steps, *bounds, color=line.get_color(), alpha=0.2, lw=0)
        axes.legend()


def plot_plane(path: Path, groups: dict[str, list[Run]]) -> None:
    """Plot the trajectory of every run: validation loss against KL divergence."""
    with new_figure(path, 6, 4.5) as figure:
        axes = figure.add_subplot(xlabel="KL from the base on held-out text (nats per token)", ylabel=NAMES["val_loss"])
        for number, (method, runs) in enumerate(groups.items()):
            for run in runs:
                x, y = _points(run.rows)
                axes.plot(x, y, color=f"C{number}", lw=0.8, alpha=0.7, marker=".", ms=3)
                axes.plot(x[-1], y[-1], color=f"C{number}", marker="o", ls="", label=method if run is runs[0] else None)
        axes.legend(title="end of training")


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row[KL] for row in rows], [row["val_loss"] for row in rows]


def _setting(runs: Sequence[Run], config: Any) -> str:
    seeds = len({run.seed for run in runs})
    minutes = mean(run.last["seconds"] for run in runs) / 60
    source = config.data.source
    examples = config.data.get("global_batch_size") or config.data.batch_size or BATCH
    return (
        f"Model `{config.model.name_or_path}` ({config.model.dtype}), data `{source.class_path.rpartition('.')[2]}`, "
        f"r = {config.adapter.r}, {counted(int(runs[0].last['step']), 'optimizer step')}, batch size {examples}, "
        f"{counted(seeds, 'seed')}; {minutes:.1f} minutes a run. Each run's whole configuration is in its folder. "
        f"milora-lightning {version('milora-lightning')}, torch {version('torch')}, {date.today()}."
    )
