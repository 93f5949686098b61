"""The report of ``continual``: the matrix of results, and measures of learning and forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from milora_lightning.comparison.runs import write_rows
from milora_lightning.metrics.continual import continual
from milora_lightning.screen.figures import number
from milora_lightning.utils.markdown import table

METRICS = {"val_loss": ("validation loss, nats per token", False), "val_accuracy": ("accuracy", True)}
"""The results that are shown as matrices, by name: their title, and whether higher is better."""

Results = dict[str, dict[str, float]]


def matrices(tasks: Sequence[str], rows: Sequence[Results]) -> Iterator[tuple[str, bool, list[list[float]]]]:
    """Yield the title of each metric that all tasks have, whether higher is better, and its matrix."""
    for name, (title, higher) in METRICS.items():
        if all(name in row[task] for row in rows for task in tasks):
            yield title, higher, [[row[task][name] for task in tasks] for row in rows]


def labels(tasks: Sequence[str]) -> list[str]:
    """Return the names of a matrix's rows."""
    return ["before training", *(f"after {task}" for task in tasks)]


def show(tasks: Sequence[str], rows: Sequence[Results]) -> Group:
    """Return tables for the terminal, one for each metric."""
    tables = []
    for title, higher, matrix in matrices(tasks, rows):
        shown = Table("", *tasks, title=title, title_justify="left", box=SIMPLE, caption=sentence(matrix, higher))
        for label, values in zip(labels(tasks), matrix, strict=True):
            shown.add_row(label, *map(number, values))
        tables.append(shown)
    return Group(*tables)


def sentence(matrix: Sequence[Sequence[float]], higher: bool) -> str:
    """Summarize a matrix in a sentence.

    >>> sentence([[0.0, 0.0], [0.8, 0.1], [0.6, 0.9]], higher=True)
    'At the end 0.75 on average; backward transfer -0.2, forgetting 0.2, forward transfer 0.1.'
    """
    found = continual(matrix, higher)
    more = [
        f"{name.replace('_', ' ')} {number(value)}"
        for name, value in found._asdict().items()
        if name != "average" and value is not None
    ]
    return f"At the end {number(found.average)} on average" + (f"; {', '.join(more)}." if more else ".")


def write_report(folder: Path, tasks: Sequence[str], rows: Sequence[Results], lost: Sequence[float]) -> None:
    """Write results.csv and report.md.

    Args:
        folder: The folder to write to.
        tasks: Names of the tasks in order.
        rows: The results of all tasks before training and after each.
        lost: The fraction of each task's update that was lost to rounding when it was merged.
    """
    write_rows(
        folder / "results.csv",
        [
            {"after": label, "task": task, **row[task]}
            for label, row in zip(labels(tasks), rows, strict=True)
            for task in tasks
        ],
    )
    parts = ["# " + ", ".join(tasks)]
    for title, higher, matrix in matrices(tasks, rows):
        cells = [[label, *map(number, values)] for label, values in zip(labels(tasks), matrix, strict=True)]
        parts += [f"## {title[0].upper()}{title[1:]}", table(["", *tasks], cells), sentence(matrix, higher)]
    parts += [
        "Each column is a task's validation set, each row the folded model. Backward transfer: how much better earlier "
        "tasks are at the end than right after they were learned (negative: forgotten). Forgetting: how much worse "
        "than at their best since then. Forward transfer: how much better later tasks are right before they are "
        "learned than before all training. Of losses, better is lower.",
        "Rounding has lost of the updates' norm, when they were folded: "
        + ", ".join(f"{task} {value:.2%}" for task, value in zip(tasks, lost, strict=True))
        + ".",
    ]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
