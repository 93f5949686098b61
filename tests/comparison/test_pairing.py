"""Which values are compared with which: by seed, by examples, by rate, and in which direction an advantage lies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from milora_lightning.comparison.findings import Margins, at_equal, at_the_end, compare_values, envelope
from milora_lightning.comparison.measures import JUDGED, Measure
from milora_lightning.comparison.report import make_report, markdown
from milora_lightning.comparison.runs import Examples, Run, read_rows, write_rows
from milora_lightning.comparison.selection import at_edge, best_rate, mean_losses, next_rate, set_apart
from milora_lightning.comparison.statistics import estimate

MARGINS = Margins(0.01, 0.05)
PLAIN, RATIO = Measure("reported_loss", "loss"), Measure("forgetting_kl", "KL", relative=True)


def ended(method: str, seed: int, rate: float = 1e-3, **last: float) -> Run:
    """A run with the given results at its end, and none before."""
    start = dict.fromkeys(last, 2.0)
    return Run(method, rate, seed, [{"step": 0.0, "seconds": 0.0, **start}, {"step": 9.0, "seconds": 60.0, **last}])


def kept(values: list[float]) -> Examples:
    """What a result is the average of, at one validation."""
    return Examples(np.array([values]), np.ones(len(values)), np.zeros(1), np.arange(len(values)))


def test_seeds_are_paired_whatever_their_order_and_lonely_ones_left_out() -> None:
    ours = {2: (1.4, None), 0: (1.0, None), 1: (1.2, None), 7: (9.0, None)}
    others = {1: (1.1, None), 2: (1.3, None), 0: (0.9, None)}
    found = compare_values(PLAIN, {"a": ours, "b": others}, "b", MARGINS, 0)
    assert found.estimates["a"].value == pytest.approx(0.1)
    assert found.estimates["a"].error == pytest.approx(0, abs=1e-12)
    assert found.estimates["a"].freedom == 2
    assert "b" not in found.judgements


def test_examples_count_only_where_every_run_has_kept_its_own() -> None:
    draws = np.random.default_rng(0).normal(size=50)
    whole = {seed: (1.0 + 0.1 * seed, draws) for seed in range(3)}
    some = {**whole, 1: (1.1, None)}
    reference = {seed: (1.0, np.zeros(50)) for seed in range(3)}
    for values, drawn in ((whole, float(draws.std(ddof=1))), (some, 0.0)):
        found = compare_values(PLAIN, {"a": values, "b": reference}, "b", MARGINS, 40)
        assert found.estimates["a"].drawn == pytest.approx(drawn)


@pytest.mark.parametrize("measure", JUDGED, ids=[measure.name for measure in JUDGED])
def test_answers_that_are_all_wrong_show_that_methods_are_equal_only_if_there_are_many(measure: Measure) -> None:
    """Whatever examples are drawn, all are wrong. Losses that are alike in every draw are alike."""
    alike = 0.0 if measure.is_share else 1.0
    values = {method: {seed: (alike, np.full(50, alike)) for seed in range(3)} for method in ("a", "b")}
    found = [compare_values(measure, values, "b", MARGINS, examples).judgements["a"] for examples in (20, 2000)]
    assert [each.verdict for each in found] == ["undecided" if "accuracy" in measure.name else "equal", "equal"]


@pytest.mark.parametrize(("factor", "verdict"), [(1.9, "equal"), (0.55, "equal"), (2.2, "worse"), (0.45, "better")])
def test_a_margin_of_ratios_is_one_of_logarithms(factor: float, verdict: str) -> None:
    """A margin of 100 % allows from half to twice as much."""
    values = {"a": {s: (factor * (1 + s), None) for s in range(3)}, "b": {s: (1.0 + s, None) for s in range(3)}}
    found = compare_values(RATIO, values, "b", Margins(0.01, 1.0), 0)
    assert found.judgements["a"].verdict == verdict
    assert found.estimates["a"].value == pytest.approx(math.log(factor))


def test_more_is_better_of_accuracies_alone() -> None:
    names = [measure.name for measure in JUDGED]
    runs = [ended(m, s, **dict.fromkeys(names, v + 0.001 * s)) for m, v in (("a", 0.5), ("b", 0.3)) for s in range(3)]
    found = {f.measure.name: f.judgements["a"].verdict for f in at_the_end(runs, "b", MARGINS)}
    assert found == {name: "better" if "accuracy" in name else "worse" for name in names}


def test_the_same_examples_choose_rates_in_every_run() -> None:
    runs = [Run("a", rate, 8, [{"step": 0.0}], {"val_loss": kept([*map(float, range(40))])}) for rate in (1e-3, 1e-2)]
    for run in runs:
        set_apart(run, 0.25)
    chosen = [run.examples["selection_loss"].index.tolist() for run in runs]
    assert chosen[0] == chosen[1] == sorted(chosen[0])
    assert len(chosen[0]) == 10
    assert set(chosen[0]) | set(runs[0].examples["reported_loss"].index.tolist()) == set(range(40))
    assert runs[0].rows[0]["selection_loss"] == pytest.approx(np.mean(chosen[0]))


def test_a_rate_that_diverges_with_one_seed_is_not_taken() -> None:
    losses = {(1e-3, 0): 0.4, (1e-3, 1): 0.6, (1e-2, 0): 0.1, (1e-2, 1): float("nan")}
    sweep = [ended("a", s, rate, selection_loss=v, reported_loss=1 - v) for (rate, s), v in losses.items()]
    assert mean_losses(sweep) == {1e-3: 0.5, 1e-2: math.inf}
    assert best_rate(sweep) == 1e-3


def test_the_next_rate_is_a_step_of_the_given_ones_beyond_the_edge() -> None:
    def sweep(**losses: float) -> list[Run]:
        return [ended("a", 0, float(rate), selection_loss=loss) for rate, loss in losses.items()]

    falling = {"1e-3": 0.3, "1e-2": 0.2, "3e-2": 0.1}
    for given in ([1e-3, 1e-2, 3e-2], [3e-2, 1e-3, 1e-2]):
        assert next_rate(sweep(**falling), given, 1) == 0.09
        assert next_rate(sweep(**falling, **{"9e-2": 0.05}), given, 1) is None
        assert next_rate(sweep(**{"1e-3": 0.1, "1e-2": 0.2, "3e-2": 0.3}), given, 1) == 1e-4
    assert next_rate(sweep(**{"1e-3": 0.3}), [1e-3], 3) is None
    assert not at_edge(sweep(**{"1e-3": 0.3}))
    assert at_edge(sweep(**falling))


def test_runs_that_differ_have_folders_that_differ() -> None:
    runs = [Run(m, rate, seed) for m in ("a b", "a c") for rate in (1e-3, 1.25e-3, 1e-2) for seed in (0, 10)]
    assert len({run.name for run in runs}) == len(runs)
    assert not any(" " in run.name for run in runs)


def test_draws_are_the_same_for_all_runs_and_others_for_each_result() -> None:
    values = np.random.default_rng(0).normal(size=30).tolist()
    one, other = (Run("a", rate, 0, [{}], {"x": kept(values), "y": kept(values)}) for rate in (1e-3, 1e-2))
    assert np.array_equal(one.draws("x"), other.draws("x"))
    assert not np.array_equal(one.draws("x"), one.draws("y"))
    assert one.draws("absent").shape == (1, 1)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"step": 0, "loss": 2.5}, {"step": 3, "loss": 0, "kl": float("nan")}]
    write_rows(tmp_path / "rows.csv", rows)
    first, last = read_rows(tmp_path / "rows.csv")
    assert first == {"step": 0, "loss": 2.5}
    assert (last["step"], last["loss"], math.isnan(last["kl"])) == (3, 0, True)


def falling(method: str, seed: int, rate: float, end: float, kl: float, **more: float) -> Run:
    """A run whose loss falls from 2 to its end while KL rises, both evenly."""
    shares = (0.0, 0.5, 1.0)
    rows = [
        {"step": 9 * s, "seconds": 9.0, "reported_loss": 2 - s * (2 - end), "forgetting_kl": s * kl, "update_effect": s}
        | {name: value + s for name, value in more.items()}
        for s in shares
    ]
    return Run(method, rate, seed, rows)


def test_the_envelope_is_of_each_seed_and_of_the_losses_that_rates_are_chosen_by() -> None:
    sweep = [falling(m, s, r, 1.0, 0.5, selection_loss=s) for m in ("a", "b") for s in (8, 9) for r in (1e-3, 1e-2)]
    found = envelope([], sweep, "a", MARGINS)
    assert found is not None
    assert found.finding.measure.name == "selection_loss"
    one, other = found.finding.values["b"]
    assert other - one == pytest.approx(1.0)  # seed 9 has a loss larger by one than seed 8
    reported = envelope(sweep, [], "a", MARGINS)
    assert reported is not None
    assert reported.finding.measure.name == "reported_loss"


@pytest.mark.parametrize("place", ["update_effect", "reported_loss"])
def test_places_are_levels_that_all_runs_pass_with_draws_of_their_own(place: str) -> None:
    runs = []
    for method, kl in (("a", 0.5), ("b", 0.25)):
        for seed in range(3):
            run = falling(method, seed, 1e-3, 1.0, kl * (1 + 0.01 * seed))
            for row in run.rows:
                row["forgetting_choice_loss"] = row["forgetting_kl"]
            losses = run.course("reported_loss")[:, None] + np.linspace(-0.1, 0.1, 12)
            run.examples = {"reported_loss": Examples(losses, np.ones(12), run.course("step"), np.arange(12))}
            runs.append(run)
    shares = [0.5, 0.75, 0.95]
    levels = shares if place == "update_effect" else [2 - share for share in shares]
    for name in ("forgetting_kl", "forgetting_choice_loss"):
        found = [f for f in at_equal(place, runs, "a", MARGINS) if f.measure.name == name]
        assert [f.place[1] for f in found if f.place] == pytest.approx(levels)
        for share, finding in zip(shares, found, strict=True):
            difference = math.log(0.5) if name == "forgetting_kl" else -0.2525 * share
            assert finding.estimates["b"].value == pytest.approx(difference)
            assert finding.judgements["b"].verdict == "better"
            # Losses of examples that are harder or easier throughout have other levels: nothing varies with the draw.
            assert finding.estimates["b"].drawn == pytest.approx(0, abs=1e-6)
            assert finding.estimates["b"].drawn_freedom == (11 if place == "reported_loss" else 1)


def test_the_report_names_the_last_level_the_verdicts_p_value_and_each_rates_own_numbers() -> None:
    runs = [falling(m, s, 1e-3, 1.0 + 0.001 * s, kl) for m, kl in (("a", 0.5), ("b", 0.5)) for s in range(3)]
    sweep = [falling(m, 9, r, e, 40 * r, selection_loss=e) for m in ("a", "b") for r, e in ((1e-3, 1.0), (1e-2, 1.5))]
    text = markdown(make_report(runs, sweep, "", "a", MARGINS, [1e-3, 1e-2]))
    assert "| b | +0 (+0 to +0), p < 0.0001: equal |" in text  # of equality; that of a difference is 1
    assert "| a | [2.0000, 0.04] | 2.5000, 0.4 |" in text
    assert "| before training |  | 2 | 0 |" in text
    assert "extended" not in text
    for given, alone in ((runs, False), ([run for run in runs if run.seed == 0], True)):
        sections = {each.title: each.text for each in make_report(given, [], "", "a", MARGINS, []).sections}
        assert ("One seed tells nothing" in sections["Differences from a"]) == alone
    assert estimate(np.zeros(3)).p_different() == 1.0
