"""Comparisons whose truth is planted: what the report says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.planted_runs import MARGINS, RATES, TRUTH, comparison, planted

from milora_lightning.comparison.findings import at_equal, at_the_end, envelope
from milora_lightning.comparison.page import page_data, script_text
from milora_lightning.comparison.report import make_report, markdown, plot_curves
from milora_lightning.comparison.runs import (
    by_method,
    check_same_examples,
    read_examples,
    write_examples,
)
from milora_lightning.comparison.sections import equal_places, lower_envelope
from milora_lightning.comparison.selection import best_rate, set_apart


def test_what_is_equal_better_and_worse_is_called_so() -> None:
    runs, _ = comparison(5)
    loss, kl = at_the_end(runs, "lora", MARGINS)
    assert {m: j.verdict for m, j in loss.judgements.items()} == {
        "same": "equal",
        "good": "better",
        "keeper": "equal",
        "bad": "worse",
    }
    assert {m: j.verdict for m, j in kl.judgements.items()} == {
        "same": "equal",
        "good": "equal",
        "keeper": "better",
        "bad": "worse",
    }
    assert loss.estimates["good"].value == pytest.approx(-0.1 * (1 - np.exp(-2.5)), abs=0.01)
    assert kl.estimates["keeper"].value == pytest.approx(np.log(0.5), abs=0.02)


def test_at_equal_loss_a_method_that_learns_more_has_forgotten_less() -> None:
    """All end with the same KL, but the good one passes each loss earlier."""
    runs, _ = comparison(5)
    findings = at_equal("reported_loss", runs, "lora", MARGINS)
    assert len(findings) == 3
    for finding in findings:
        assert finding.judgements["good"].verdict == "better"
        assert finding.judgements["keeper"].verdict == "better"
        assert finding.judgements["same"].verdict in ("equal", "undecided")
    assert findings[-1].judgements["same"].verdict == "equal"


def test_at_equal_size_and_along_the_envelope() -> None:
    runs, sweep = comparison(5)
    found = {(f.measure.name, f.place[1] if f.place else 0): f for f in at_equal("update_size", runs, "lora", MARGINS)}
    assert sorted({level for _, level in found}) == pytest.approx([0.02, 0.03, 0.038])
    assert found["reported_loss", 0.03].judgements["good"].verdict == "better"
    area = envelope(runs, sweep, "lora", MARGINS)
    assert area is not None
    values = {method: np.mean(each) for method, each in area.finding.values.items()}
    assert values["good"] < values["same"] < values["bad"]
    assert values["keeper"] < values["lora"] - 0.05
    assert values["same"] == pytest.approx(values["lora"], abs=0.02)


@pytest.mark.parametrize(
    ("seeds", "examples", "noise"), [(1, 400, 0.05), (2, 12, 1.0)], ids=["one seed", "little data"]
)
def test_with_little_data_nothing_is_claimed(seeds: int, examples: int, noise: float) -> None:
    runs, _ = comparison(seeds, examples, noise)
    (loss, *_) = at_the_end(runs, "lora", MARGINS)
    assert {j.verdict for j in loss.judgements.values()} == {"undecided"}


def test_equal_methods_are_seldom_called_different() -> None:
    wrong = 0
    for trial in range(15):
        runs = [
            planted(m, 1e-3, 100 * trial + seed, 60, 0.0, 1.0, 0.3)
            for seed in range(3)
            for m in ("lora", "a", "b", "c")
        ]
        for run in runs:
            set_apart(run, None)
        (loss, *_) = at_the_end(runs, "lora", MARGINS)
        wrong += any(j.verdict in ("better", "worse") for j in loss.judgements.values())
    assert wrong <= 3  # of 15, at a level of 5 % for all methods together


def test_the_report_and_its_page_say_the_same() -> None:
    runs, sweep = comparison(3)
    runs[4].method = runs[9].method = runs[14].method = "</script><b>"
    report = make_report(runs, sweep, "", "lora", MARGINS, list(RATES))
    text, data = markdown(report), page_data(report)
    for section in data["sections"]:
        for row in section["rows"]:
            assert all(cell in text for cell in row)
    assert json.loads(script_text(data)) == json.loads(json.dumps(data))
    assert "</script" not in script_text(data)
    assert len(data["runs"]) == len(runs) + len(sweep)
    assert re.search(r"\| good \| [^|]*: better \|", text)
    assert "**" not in text


def test_a_method_without_adapters_has_no_size_of_its_update_and_all_else() -> None:
    runs, sweep = comparison(2)
    for run in runs:
        if run.method == "bad":
            run.rows = [{name: value for name, value in row.items() if name != "update_size"} for row in run.rows]
    text = markdown(make_report(runs, sweep, "", "lora", MARGINS, list(RATES)))
    assert re.search(r"\| lora \| 0.001 \| .* \| 0.04 ± 0 \|", text)
    assert re.search(r"\| bad \| 0.001 \| .* \|  \|", text)
    assert "at equal loss" in text
    assert "at equal size" not in text


def test_rates_are_chosen_on_examples_that_are_not_reported() -> None:
    """The best rate is that of the selection part, whatever the reported part would say."""
    sweep = [planted("a", rate, 8, 40, 0.0, 1.0, 0.0) for rate in RATES]
    for run, on_selection, reported in zip(sweep, (0.1, 0.2, 0.3), (9.0, 8.0, 7.0), strict=True):
        set_apart(run, 0.5)
        chosen, shown = (run.examples[f"{part}_loss"] for part in ("selection", "reported"))
        assert not set(chosen.index.tolist()) & set(shown.index.tolist())
        assert len(chosen.index) == len(shown.index) == 20
        run.rows[-1] |= {"selection_loss": on_selection, "reported_loss": reported}
    assert best_rate(sweep) == 3e-4


def test_too_little_validation_data_is_refused() -> None:
    run = planted("a", 1e-3, 0, 2, 0.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"Of 2 validation examples, a share of 0\.3"):
        set_apart(run, 0.3)


def test_examples_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "examples.npz"
    kept = planted("a", 1e-3, 0, 7, 0.0, 1.0, 0.1).examples
    write_examples(path, kept)
    read = read_examples(path)
    assert list(read) == list(kept)
    for name, each in kept.items():
        assert read[name].means() == pytest.approx(each.means(), rel=1e-6)
        assert read[name].index.tolist() == each.index.tolist()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        read_examples(path)


def test_a_run_that_diverged_leaves_its_method_undecided_and_the_rest_as_it_was() -> None:
    runs, sweep = comparison(3, examples=100)
    lost = next(run for run in runs if run.method == "good")
    for each in lost.examples.values():
        each.values[-2:] = np.nan
    for row in lost.rows[-2:]:
        row.update(dict.fromkeys(set(row) - {"step", "seconds"}, float("nan")))
    set_apart(lost, 0.3)
    report = make_report(runs, sweep, "", "lora", MARGINS, list(RATES))
    text = markdown(report)
    assert "not finite in 1 of 3" in text
    assert "| good | ?: undecided | ?: undecided |" in text  # at the end; before, it has gone as far as the others
    assert re.search(r"\| bad \| [^|]*: worse \|", text)
    assert "NaN" not in script_text(page_data(report))  # which a browser could not read


def test_a_method_that_diverged_at_once_is_left_out_of_what_is_compared_at_equal_loss() -> None:
    """By itself: the others are compared as they were without it."""
    runs, _ = comparison(2, examples=20)
    others = [run for run in runs if run.method != "good"]
    lost = next(run for run in runs if run.method == "good")
    for row in lost.rows[1:]:
        row.update(dict.fromkeys(set(row) - {"step", "seconds"}, float("nan")))
    found, without = (at_equal("reported_loss", of, "lora", MARGINS) for of in (runs, others))
    assert [finding.judgements for finding in found] == [finding.judgements for finding in without] != []
    (section,) = equal_places("reported_loss", found, "lora", list(TRUTH))
    assert section.text.endswith("Left out: good, of which a run goes no part of that way.")
    assert at_equal("reported_loss", runs, "good", MARGINS) == []


def test_one_sweep_seed_decides_nothing_along_the_envelope_and_the_report_says_so() -> None:
    runs, sweep = comparison(1, examples=20)
    areas = [envelope(runs, [run for run in sweep if run.seed in seeds], "lora", MARGINS) for seeds in ((8,), (8, 9))]
    texts = [lower_envelope(area, "lora", from_sweep=True).text for area in areas if area is not None]
    assert ["One seed tells nothing of the spread" in text for text in texts] == [True, False]


def test_runs_that_end_at_other_steps_are_drawn_at_those_that_they_share(tmp_path: Path) -> None:
    runs, _ = comparison(2, examples=20)
    del runs[0].rows[-1]
    plot_curves(tmp_path / "curves.png", by_method(runs))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_a_method_on_other_examples_are_not_mixed() -> None:
    """A comparison that was continued after its data had changed."""
    same = [planted("a", 1e-3, seed, 20, 0.0, 1.0, 0.1) for seed in (0, 1)]
    check_same_examples([*same, planted("b", 1e-3, 0, 21, 0.0, 1.0, 0.1)])  # an overlay may bring other data
    same[1].examples["val_loss"].weights[3] += 1  # a token more
    with pytest.raises(ValueError, match=r"a-lr0.001-seed0 and a-lr0.001-seed1 were measured on other examples"):
        check_same_examples(same)
