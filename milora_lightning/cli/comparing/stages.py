"""Training the runs of one stage of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from milora_lightning.cli.comparing.side_by_side import train_side_by_side
from milora_lightning.cli.comparing.single import Comparison
from milora_lightning.comparison.runs import Run


def train_all(comparison: Comparison, runs: Sequence[Run], what: str, save: bool, parallel: int | None) -> None:
    """Train the runs that are not finished, one after the other or side by side.

    Args:
        comparison: Trains a run.
        runs: Runs; those that have results are skipped.
        what: The name of the stage.
        save: Whether to keep adapters.
        parallel: Number of runs at a time; None for one per GPU.
    """
    pending = [run for run in runs if not run.rows]
    at_once = max(1, torch.cuda.device_count()) if parallel is None else parallel
    if at_once > 1 and pending:
        train_side_by_side(comparison, pending, what, save, at_once)
        return
    for number, run in enumerate(pending, 1):
        Console().rule(f"{what}, run {number} of {len(pending)}: {run.name}")
        comparison.train(run, save)
