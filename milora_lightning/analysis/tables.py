"""Analyses as tables: averages for each module type, and files with the numbers of every matrix."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from milora_lightning.analysis.spectra import MatrixAnalysis


def by_type(matrices: Iterable[MatrixAnalysis]) -> dict[str, list[MatrixAnalysis]]:
    """Group matrices by module type; each group is in the order of its layers."""
    groups = defaultdict(list)
    for matrix in matrices:
        groups[matrix.module_type].append(matrix)
    return {name: sorted(group, key=lambda matrix: matrix.depth) for name, group in groups.items()}


def measures(matrix: MatrixAnalysis) -> dict[str, float]:
    """Return the numbers that describe one matrix, by their names in files."""
    effect = {} if matrix.effect is None else {"update_effect": matrix.effect}
    return {
        **matrix.similarity,
        "amplification": matrix.amplification,
        "relative_norm": matrix.relative_norm,
        "interference": matrix.interference,
        "intruders": matrix.intruders,
        **effect,
    }


def averages(matrices: Sequence[MatrixAnalysis]) -> dict[str, float]:
    """Average the :func:`measures` of matrices; the effect only over those where it was measured."""
    values = defaultdict(list)
    for matrix in matrices:
        for name, value in measures(matrix).items():
            values[name].append(value)
    return {name: mean(each) for name, each in values.items()}


PLACE = {"top": "φ top", "bottom": "bottom", "random": "random", "expected": "r/out", "interference": "ρ_k"}
SIZE = {
    "relative_norm": "‖ΔW‖/‖W‖",
    "update_effect": "‖ΔWx‖/‖Wx‖",
    "amplification": "amplification",
    "intruders": "intruders",
}
COLUMNS = {**PLACE, **SIZE}
"""Column headings."""


def summary(matrices: Sequence[MatrixAnalysis]) -> Group:
    """Return tables of averages over layers, with one row for each module type and one for all."""
    k = " to ".join(str(k) for k in sorted({min(m.k for m in matrices), max(m.k for m in matrices)}))
    place = (
        f"Where ΔW lies in W's spectrum: similarity φ, and the share ρ_k within the first k = {k}; means over layers"
    )
    size = "How large ΔW is, and the intruders in W + ΔW; means over layers"
    return Group(_table(place, matrices, PLACE), _table(size, matrices, SIZE))


def _table(title: str, matrices: Sequence[MatrixAnalysis], columns: dict[str, str]) -> Table:
    groups = {**by_type(matrices), "all": list(matrices)}
    shown = [name for name in columns if name in averages(matrices)]
    headings = [columns[name] for name in shown]
    table = Table("module", "layers", *headings, title=title, title_justify="left", box=SIMPLE, collapse_padding=True)
    for number, (name, group) in enumerate(groups.items(), 2):
        found = averages(group)
        values = [f"{found[each]:.3g}" if each in found else "" for each in shown]
        table.add_row(name, str(len(group)), *values, end_section=number == len(groups))
    return table


def write_json(path: Path, matrices: Sequence[MatrixAnalysis], settings: dict[str, Any]) -> None:
    """Write the settings, the averages over all matrices and over each module type, and each matrix's numbers.

    Args:
        path: The file to write.
        matrices: The analyses.
        settings: The settings of the analysis.
    """
    content = {
        "settings": settings,
        "mean": averages(matrices),
        "modules": {name: averages(group) for name, group in by_type(matrices).items()},
        "matrices": {m.layer: {"r": m.r, "k": m.k, **measures(m)} for m in matrices},
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tables(folder: Path, matrices: Sequence[MatrixAnalysis]) -> None:
    """Write analyses to similarity.csv, spectra.csv and energy.csv in a folder.

    Args:
        folder: The folder to write to.
        matrices: The analyses.
    """
    names = [name for name in COLUMNS if name in averages(matrices)]
    _write_csv(
        folder / "similarity.csv",
        ("layer", "module", "block", "r", "k", *names),
        ((m.layer, m.module_type, m.depth, m.r, m.k, *(measures(m).get(name, "") for name in names)) for m in matrices),
    )
    _write_csv(
        folder / "spectra.csv",
        ("layer", "module", "block", "matrix", "index", "singular_value"),
        (
            (m.layer, m.module_type, m.depth, matrix, index, value)
            for m in matrices
            for matrix, values in (("W", m.singular_values), ("delta", m.delta_singular_values))
            for index, value in enumerate(values.tolist())
        ),
    )
    _write_csv(
        folder / "energy.csv",
        ("layer", "module", "block", "from", "to", "left", "right"),
        (
            (m.layer, m.module_type, m.depth, i / len(m.left_energy), (i + 1) / len(m.left_energy), left, right)
            for m in matrices
            for i, (left, right) in enumerate(zip(m.left_energy.tolist(), m.right_energy.tolist(), strict=True))
        ),
    )


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)
