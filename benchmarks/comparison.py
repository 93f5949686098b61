"""Tables and pictures of two comparisons of methods, which `python main.py compare` has trained.

benchmarks/results/two_cores.md says with which commands.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from common import publish
from figures import PLOTS

from milora_lightning.cli.report import by_method, plot_plane, results_table, sweep_table
from milora_lightning.cli.runs import Run, read_rows

TASKS = {"gsm8k": "GSM8K", "commonsense": "ARC-Easy"}


def finished_runs(folder: Path, stage: str) -> list[Run]:
    """Read the runs of a comparison, or of its learning-rate sweep."""
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == stage]
    runs = [Run(row["method"], float(row["learning_rate"]), int(row["seed"])) for row in rows]
    for run in runs:
        run.rows = read_rows(folder / run.name / "trajectory.csv")
    return runs


def main(folder: Path) -> None:
    PLOTS.mkdir(exist_ok=True)
    parts = []
    for name, task in TASKS.items():
        output = folder / f"comparison_{name}"
        groups = by_method(finished_runs(output, "comparison"))
        picture = PLOTS / f"comparison_{name}.png"
        plot_plane(picture, groups)
        image = f"![Validation loss on {task} against forgetting](../plots/{picture.name})"
        sweep = sweep_table(finished_runs(output, "sweep"))
        seeds = len(next(iter(groups.values())))
        parts += [f"**{task}**, seeds: {seeds}", results_table(groups), image, sweep]
    publish("comparison", "\n\n".join(parts))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
