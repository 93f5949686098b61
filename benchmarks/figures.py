"""Plots: of curves on logarithmic axes, and of published tables, so that a figure says what its table does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PLOTS = Path(__file__).parent / "plots"
COLUMNS = {
    "decomposition": "times faster, float32 / bfloat16",
    "surgery": "seconds",
    "training": "tokens/s",
}
"""Whose tables are drawn, and which column of them."""


def growth_plot(name: str, xlabel: str, series: dict[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """Plot seconds on logarithmic axes into plots/NAME.png; return each curve's exponent, fitted to its upper half."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    exponents = {}
    for label, (x, seconds) in series.items():
        upper = slice(len(x) // 2, None)
        exponents[label] = float(np.polyfit(np.log(x[upper]), np.log(seconds[upper]), 1)[0])
        axes.loglog(x, seconds, marker="o", label=f"{label}: exponent {exponents[label]:.1f}")
    axes.set(xlabel=xlabel, ylabel="seconds")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_plot(name, figure)
    return exponents


def save_plot(name: str, figure: Figure) -> None:
    """Save a figure as plots/NAME.png."""
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / f"{name}.png", dpi=120)


def draw_tables(script: str, page: str) -> None:
    """Draw a column of each of a script's tables in a page's text, panel by panel, into plots/SCRIPT.png."""
    sections = re.findall(rf"<!-- {script}\S* -->\n(.*?)<!-- /", page, re.DOTALL)
    tables = [rows for rows in map(cells, sections) if rows and COLUMNS[script] in rows[0]]
    heights = [len(rows) + 1 for rows in tables]
    figure = Figure(figsize=(6, 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(tables), squeeze=False, height_ratios=heights)
    for axes, rows in zip(panels[:, 0], tables, strict=True):
        panel(axes, rows, COLUMNS[script])
    save_plot(script, figure)


def cells(section: str) -> list[list[str]]:
    """Return the cells of the Markdown table that a section starts with, headers first."""
    lines = takewhile(lambda line: line.startswith("|"), section.splitlines())
    rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
    return rows[:1] + rows[2:]


def panel(axes: Axes, rows: list[list[str]], column: str) -> None:
    """Draw a column of a table as horizontal bars; groups of them, where cells and header are divided by slashes."""
    headers, *body = rows
    index = headers.index(column)
    groups = [[float(number) for number in re.findall(r"[\d.]+", row[index])] for row in body]
    xlabel, _, names = column.partition(", ")
    height = 0.8 / len(groups[0])
    for number, (name, values) in enumerate(zip(names.split(" / "), zip(*groups, strict=True), strict=True)):
        bars = axes.barh([row + number * height for row in range(len(body))], values, height, label=name)
        axes.bar_label(bars, padding=2, fontsize=8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(body))], [row[0] for row in body], fontsize=8)
    axes.set_title(headers[0], fontsize=9)
    axes.set_xlabel(xlabel)
    axes.margins(x=0.15 if not names else 0.35)
    if names:
        axes.legend(fontsize=8, loc="center right")
    axes.invert_yaxis()
