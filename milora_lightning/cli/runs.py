"""The runs of a comparison, and their results as CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milora_lightning.utils.errors import InvalidInputError

Row = dict[str, float]


@dataclass
class Run:
    """One run of a comparison.

    Attributes:
        method: Name of the method.
        learning_rate: The highest learning rate.
        seed: Seed of random factors, dropout and the order of the data.
        rows: The results of every validation; empty before the run.
    """

    method: str
    learning_rate: float
    seed: int
    rows: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the run and its folder."""
        return f"{self.method.replace(' ', '_')}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def last(self) -> Row:
        """The results at the end of training."""
        return self.rows[-1]


def best_rate(sweep: Sequence[Run]) -> float | None:
    """Return the learning rate with the lowest final validation loss; None if there are no runs.

    Raises:
        ValueError: If no run of the sweep has a finite loss.
    """
    losses = {run.learning_rate: run.last["val_loss"] for run in sweep if math.isfinite(run.last["val_loss"])}
    if sweep and not losses:
        raise InvalidInputError(f"{sweep[0].method} diverges with every learning rate of the sweep: give smaller ones.")
    return min(losses, key=losses.__getitem__, default=None)


def read_rows(path: Path) -> list[Row]:
    """Read rows of numbers written by :func:`write_rows`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV; those that lack a column leave it empty."""
    columns = dict.fromkeys(key for row in rows for key in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
