"""Plots and tables of an analysis show the numbers that were found, under their names."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.planted_updates import Planted
from helpers.plots import kept_figures
from matplotlib.figure import Figure
from rich.console import Console

from milora_lightning.analysis import plots
from milora_lightning.analysis.spectra import MatrixAnalysis
from milora_lightning.analysis.tables import summary, write_json, write_tables


@pytest.fixture(scope="module")
def matrices() -> list[MatrixAnalysis]:
    """Two layers of one type, whose second has no measured effect, and one of another."""
    planted = Planted()
    bottom, top = (planted.analyze(planted.U[:, some], planted.V[:, some]) for some in (slice(-6, None), slice(6)))
    return [
        replace(bottom, layer="layers.3.q", effect=0.25, intruders=2),
        replace(top, layer="layers.5.q"),
        replace(bottom, layer="layers.3.up", effect=0.5),
    ]


@pytest.fixture
def figures(matrices: list[MatrixAnalysis], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Figure]:
    made = kept_figures(monkeypatch, plots)
    plots.plot_analysis(tmp_path, matrices)
    return made


def lines(axes: Any) -> dict[str, list[Any]]:
    """The curves of a panel by their labels; those without a label are under an empty one."""
    found: dict[str, list[Any]] = {}
    for line in axes.lines:
        label = str(line.get_label())
        found.setdefault("" if label.startswith("_") else label, []).append(line.get_ydata())
    return found


def test_each_plot_has_a_title_a_panel_for_each_type_and_a_legend(figures: dict[str, Figure]) -> None:
    legends = {}
    for name, figure in figures.items():
        assert figure.get_suptitle(), name
        assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["q", "up"]
        legends[name] = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legends == {
        "spectra.png": ["W", "ΔW"],
        "similarity.png": ["top", "bottom", "random", "r / out"],
        "sizes.png": ["‖ΔW‖ / ‖W‖", "‖ΔWx‖ / ‖Wx‖", "ρ_k"],
        "energy.png": ["left singular vectors", "right singular vectors", "evenly spread"],
    }


def test_panels_draw_what_was_measured(figures: dict[str, Figure], matrices: list[MatrixAnalysis]) -> None:
    first, second, _ = matrices
    spectra = lines(figures["spectra.png"].axes[0])
    np.testing.assert_allclose(spectra["W"][0], first.singular_values)
    np.testing.assert_allclose(spectra["ΔW"][0], first.delta_singular_values)
    for drawn, each in zip(spectra[""], (second.singular_values, second.delta_singular_values), strict=True):
        np.testing.assert_allclose(drawn, each)
    similarity = lines(figures["similarity.png"].axes[0])
    for name in ("top", "bottom", "random"):
        assert list(similarity[name][0]) == [first.similarity[name], second.similarity[name]]
    assert set(similarity["r / out"][0]) == {first.similarity["expected"]}
    panel = figures["sizes.png"].axes[0]
    sizes = lines(panel)
    assert list(sizes["‖ΔW‖ / ‖W‖"][0]) == [first.relative_norm, second.relative_norm]
    assert list(sizes["ρ_k"][0]) == [first.interference, second.interference]
    np.testing.assert_array_equal(sizes["‖ΔWx‖ / ‖Wx‖"][0], [0.25, np.nan])
    assert all(list(line.get_xdata()) == [3, 5] for line in panel.lines)  # the layers, which may be some of all
    assert all(line.get_marker() == "." for line in panel.lines)  # of a single layer, a line alone would not be seen
    counts = next(axes for axes in figures["sizes.png"].axes if axes.get_ylabel() == "intruders")
    assert [bar.get_height() for bar in counts.patches] == [2, second.intruders]
    left, right = figures["energy.png"].axes[0].patches
    np.testing.assert_allclose(left.get_data().values, (first.left_energy + second.left_energy) / 2)
    np.testing.assert_allclose(right.get_data().values, (first.right_energy + second.right_energy) / 2)
    assert list(left.get_data().edges) == [i / 8 for i in range(9)]


def test_files_hold_every_matrix(matrices: list[MatrixAnalysis], tmp_path: Path) -> None:
    write_tables(tmp_path, matrices)
    write_json(tmp_path / "analysis.json", matrices, {"k": 7})
    whole = json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))
    assert whole["settings"] == {"k": 7}
    assert whole["matrices"].keys() == {m.layer for m in matrices}
    assert whole["modules"].keys() == {"q", "up"}
    for m in matrices:
        written = whole["matrices"][m.layer]
        assert (written["r"], written["k"], written["intruders"]) == (m.r, m.k, m.intruders)
    energies = list(csv.DictReader((tmp_path / "energy.csv").open(encoding="utf-8")))
    assert len(energies) == 3 * 8
    for m in matrices:
        rows = [row for row in energies if row["layer"] == m.layer]
        assert [(float(row["from"]), float(row["to"])) for row in rows] == [(i / 8, (i + 1) / 8) for i in range(8)]
        written = torch.tensor([[float(row["left"]), float(row["right"])] for row in rows])
        shares = torch.stack([m.left_energy, m.right_energy]).float()
        torch.testing.assert_close(written.mT, shares, rtol=1e-5, atol=1e-6)
    spectra = list(csv.DictReader((tmp_path / "spectra.csv").open(encoding="utf-8")))
    for m in matrices:
        for name, values in (("W", m.singular_values), ("delta", m.delta_singular_values)):
            rows = [row for row in spectra if (row["layer"], row["matrix"]) == (m.layer, name)]
            assert [int(row["index"]) for row in rows] == list(range(len(values)))
            assert [float(row["singular_value"]) for row in rows] == pytest.approx(values.tolist(), rel=1e-5)


def test_the_printed_tables_say_what_they_are_of(matrices: list[MatrixAnalysis]) -> None:
    output = io.StringIO()
    Console(file=output, width=160).print(summary(matrices))
    printed = output.getvalue()
    said = " ".join(printed.split())
    assert f"the share ρ_k within the first k = {matrices[0].k}; means over layers" in said
    assert "How large ΔW is" in said
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] in (["q"], ["up"], ["all"])]
    assert [row[:2] for row in rows] == 2 * [["q", "2"], ["up", "1"], ["all", "3"]]
    for group, *found in zip((matrices[:2], matrices[2:], matrices), rows[:3], rows[3:], strict=True):
        numbers = {cell for row in found for cell in row[2:]}
        for name in ("relative_norm", "interference", "intruders"):
            wanted = sum(getattr(each, name) for each in group) / len(group)
            assert f"{wanted:.3g}" in numbers, name
