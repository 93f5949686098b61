"""Which sections a report has, what they leave out, and that runs are read as they were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.planted_runs import MARGINS, RATES, comparison

from milora_lightning.comparison.curves import mean_lowest
from milora_lightning.comparison.findings import at_equal
from milora_lightning.comparison.measures import KL, LOSS, SIZE
from milora_lightning.comparison.report import make_report, markdown
from milora_lightning.comparison.runs import Run
from milora_lightning.comparison.sections import by_part, sweeps

ENVELOPE = "Lower envelope of the plane"


def test_several_methods_are_compared_and_one_is_described() -> None:
    runs, sweep = comparison(2, examples=40)
    several = make_report(runs, sweep, "A setting.", "lora", MARGINS, [1e-3])
    titles = [section.title for section in several.sections]
    assert "Differences from lora" in titles
    assert ENVELOPE in titles
    text = markdown(several)
    assert text.count("learning_curves.png") == text.count("learning_forgetting.png") == 1
    assert text.index("learning_forgetting.png") < text.index(f"## {titles[1]}")
    alone = make_report([run for run in runs if run.method == "lora"], [], "", "lora", MARGINS, [])
    assert not any("Differences" in section.title for section in alone.sections)
    assert alone.title == "Comparison of lora"
    for run in [*runs, *sweep]:  # without the other axis there is no envelope
        run.rows = [{name: value for name, value in row.items() if name != KL} for row in run.rows]
        run.examples.pop(KL)
    titles = [section.title for section in make_report(runs, [], "", "lora", MARGINS, []).sections]
    assert ENVELOPE not in titles


def test_all_methods_whose_grid_was_extended_are_named() -> None:
    _, sweep = comparison(1, examples=40)
    added = [f"{method} by {rate:g}" for method in dict.fromkeys(r.method for r in sweep) for rate in sorted(RATES)[1:]]
    text = sweeps(sweep, sorted(RATES)[:1]).text
    assert all(each in text for each in added)
    assert "extended" not in sweeps(sweep, list(RATES)).text


def test_a_measure_that_some_validations_lack_leaves_the_others_where_loss_or_size_is_equal() -> None:
    runs, _ = comparison(2, examples=40)
    whole = {finding.measure.name for finding in at_equal(SIZE, runs, "lora", MARGINS)}
    assert whole == {LOSS, KL}
    for lacking in (LOSS, KL):
        runs, _ = comparison(2, examples=40)
        runs[0].rows[1].pop(lacking)
        assert {f.measure.name for f in at_equal(SIZE, runs, "lora", MARGINS)} == whole - {lacking}


def test_forgetting_is_listed_by_the_texts_that_all_runs_were_measured_on() -> None:
    runs, _ = comparison(2, examples=40)
    for i, run in enumerate(runs):
        for row in run.rows:
            row |= {"forgetting_kl/code": 0.5, "forgetting_kl/prose": 0.25} | (
                {"forgetting_kl/one": 1.0} if not i else {}
            )
    section = by_part(runs)
    assert section is not None
    assert len(section.columns) == 3
    assert section.rows[0] == ("before training", "0.5", "0.25")


def test_the_area_under_a_straight_line_is_exact() -> None:
    assert mean_lowest([np.array([0.1, 1.0])], [np.array([2.0, 1.0])], (0.1, 1.0)) == pytest.approx(1.5, abs=1e-9)


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    (run, *_), _ = comparison(1, examples=40)
    run.write(tmp_path)
    read = Run(run.method, run.learning_rate, run.seed)
    read.read(tmp_path)
    assert read.rows == run.rows
    assert read.examples.keys() == run.examples.keys()
    assert all(np.allclose(read.examples[name].values, each.values, rtol=1e-6) for name, each in run.examples.items())
    (tmp_path / "examples.npz").unlink()
    with pytest.raises(ValueError, match="a run of an earlier version"):
        read.read(tmp_path)
