"""The files that a comparison's report consists of, from runs whose results are planted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.planted_runs import MARGINS, RATES, comparison
from helpers.plots import kept_figures
from jsonargparse import Namespace
from matplotlib.figure import Figure

from milora_lightning.comparison import report as writing
from milora_lightning.comparison.findings import envelope
from milora_lightning.comparison.runs import by_method
from milora_lightning.comparison.sections import sweeps

CONFIG = Namespace(
    model=Namespace(name_or_path="some/model", dtype="bfloat16"),
    data=Namespace(source=Namespace(class_path="milora_lightning.data.WordProblems"), global_batch_size=6),
    adapter=Namespace(r=8),
)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    return kept_figures(monkeypatch, writing)


def test_a_report_is_a_table_a_page_and_plots_of_all_runs(tmp_path: Path, figures: dict[str, Figure]) -> None:
    runs, sweep = comparison(2, examples=20)
    runs[0].last["seconds"] += 60.0 * len(runs)  # a minute more on average
    writing.write_report(tmp_path, runs, sweep, CONFIG, "lora", MARGINS, list(RATES))

    rows = list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8")))
    told = [(row["stage"], row["method"], float(row["learning_rate"]), int(row["seed"])) for row in rows]
    assert told == [
        (stage, run.method, run.learning_rate, run.seed)
        for stage, those in (("comparison", runs), ("sweep", sweep))
        for run in those
    ]
    assert [float(row["val_loss"]) for row in rows] == [run.last["val_loss"] for run in [*runs, *sweep]]

    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    setting = "Model `some/model` (bfloat16), data `WordProblems`, r = 8, 200 optimizer steps, batch size 6, "
    assert f"{setting}14 reported examples, 2 seeds; 2.0 minutes a run." in text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(json.dumps(run.name) in page for run in [*runs, *sweep])
    assert '"step":"optimizer step"' in page
    assert set(figures) == {"learning_curves.png", "learning_forgetting.png"}


def test_the_plane_has_every_run_from_its_start_to_its_marked_end(figures: dict[str, Figure]) -> None:
    runs, _ = comparison(2, examples=20)
    writing.plot_plane(Path("plane.png"), by_method(runs))
    (axes,) = figures["plane.png"].axes
    drawn = [np.column_stack(line.get_data()) for line in axes.lines]
    ordered = [run for those in by_method(runs).values() for run in those]
    courses = [(run.course("forgetting_kl"), run.course("reported_loss")) for run in ordered]
    for (kl, loss), path, end in zip(courses, drawn[::2], drawn[1::2], strict=True):
        np.testing.assert_allclose(path, np.column_stack([kl, loss]))
        np.testing.assert_allclose(end, [[kl[-1], loss[-1]]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(by_method(runs))


def test_a_sweeps_table_begins_with_the_methods() -> None:
    _, sweep = comparison(2, examples=20)
    table = sweeps(sweep, list(RATES))
    assert table.columns == ("method", *(f"{rate:g}" for rate in sorted(RATES)))
    assert [row[0] for row in table.rows] == list(by_method(sweep))


def test_the_envelopes_intervals_are_drawn_the_same_each_time() -> None:
    runs, sweep = comparison(3, examples=20)
    first, second = (envelope(runs, sweep, "lora", MARGINS) for _ in range(2))
    assert first is not None
    assert first == second
