"""Comparisons of methods as a user calls them, on a tiny model."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torchmetrics import Metric

from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.cli import compare as comparing
from milora_lightning.cli.comparing import single
from milora_lightning.cli.comparing.measuring import MeasuredModule, Trajectory
from milora_lightning.cli.comparing.single import Comparison, RunCLI
from milora_lightning.cli.main import main
from milora_lightning.comparison import report
from milora_lightning.comparison.findings import Margins
from milora_lightning.comparison.report import make_report, markdown
from milora_lightning.comparison.runs import Run, read_examples
from milora_lightning.comparison.sections import spread
from milora_lightning.comparison.selection import best_rate
from milora_lightning.metrics import AnswerAccuracy, PassRate, TaskAccuracy, right_answer
from milora_lightning.metrics.code import Problem

LORA = {"adapter": {"init": "lora", "lora_alpha": 8}}


def compare(*args: str) -> None:
    common = ["--config", "mine.yaml", "--output", "comparison", "--data.num_generation_examples", "0"]
    main(["compare", *common, "--trainer.val_check_interval", "3", *args])


def fake(method: str, rate: float, seed: int, loss: float, kl: float) -> Run:
    before = {"step": 0.0, "seconds": 0.0, "selection_loss": 2.0, "reported_loss": 2.0, "forgetting_kl": 0.0}
    after = {"step": 9.0, "seconds": 60.0, "selection_loss": loss, "reported_loss": loss, "forgetting_kl": kl}
    return Run(method, rate, seed, [before, after])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of the runs that are trained."""
    trained: list[list[str]] = []
    original = RunCLI.fit

    def fit(self: RunCLI) -> Any:
        trained.append([self.config.adapter.init, self.config.model.optimizer.init_args.lr, self.config.data.seed])
        return original(self)

    monkeypatch.setattr(RunCLI, "fit", fit)
    return trained


def test_a_comparison_sweeps_trains_reports_and_resumes(
    project: Path,
    runs: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (project / "lora.yaml").write_text(yaml.safe_dump(LORA))
    (project / "text.txt").write_text("What is 1 plus 2? " * 100)
    options = ["--methods", "[milora,lora.yaml]", "--learning_rates", "[1e-3,1e-2]", "--text", "text.txt"]
    options += ["--text_tokens", "256", "--seeds", "[4]", "--sweep_seeds", "[5]", "--extend", "0"]
    options += ["--questions", "questions.jsonl"]
    questions = [{"question": f"What is {i} plus 1?", "choices": ["1", str(i + 1)], "answer": 1} for i in range(3)]
    (project / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    compare(*options)

    assert runs[:4] == [["milora", 1e-3, 5], ["milora", 1e-2, 5], ["lora", 1e-3, 5], ["lora", 1e-2, 5]]
    output = project / "comparison"
    rows = list(csv.DictReader((output / "results.csv").open()))
    sweep, final = ([r for r in rows if r["stage"] == stage] for stage in ("sweep", "comparison"))
    for method in ("milora", "lora"):
        losses = {float(r["learning_rate"]): float(r["selection_loss"]) for r in sweep if r["method"] == method}
        assert len(losses) == 2
        chosen = {float(r["learning_rate"]) for r in final if r["method"] == method}
        assert chosen == {min(losses, key=losses.__getitem__)}
        assert [r["seed"] for r in final if r["method"] == method] == ["4"]
    for row in final:
        folder = output / f"{row['method']}-lr{float(row['learning_rate']):g}-seed{row['seed']}"
        trajectory = list(csv.DictReader((folder / "trajectory.csv").open()))
        assert [int(r["step"]) for r in trajectory] == [0, 3, 6]
        assert float(trajectory[0]["forgetting_kl"]) == 0 < float(trajectory[-1]["forgetting_kl"])
        assert trajectory[-1]["val_loss"] == row["val_loss"] != trajectory[0]["val_loss"]
        assert float(trajectory[0]["update_size"]) == 0 < float(trajectory[-1]["update_size"])
        assert {t["forgetting_choice_loss"] == "" for t in trajectory} == {True, False}  # at the start and the end
        whole = read_examples(folder / "examples.npz")
        for measure in ("val_loss", "forgetting_kl", "forgetting_choice_loss"):
            last = float(trajectory[-1][measure])
            assert whole[measure].means()[-1] == pytest.approx(last, rel=1e-5)  # examples make up the result
        parts = whole["val_loss"].weights * whole["val_loss"].values[-1]
        assert len(parts) == 6
        chosen, shown = (float(row[name]) for name in ("selection_loss", "reported_loss"))
        assert chosen != shown
        assert min(chosen, shown) < float(row["val_loss"]) < max(chosen, shown)
        assert read_checkpoint(folder / "last.ckpt")["global_step"] == 6
    text = (output / "report.md").read_text()
    losses = [float(r["reported_loss"]) for r in final if r["method"] == "lora"]
    assert f"| {spread(losses)} |" in text
    assert "undecided" in text  # one seed
    assert "the best is at the edge of the grid" in text
    page = (output / "report.html").read_text()
    assert "lora-lr" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing is loaded
    for name in ("learning_curves.png", "learning_forgetting.png"):
        assert name in text
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert not list((project / "out").rglob("*.ckpt"))

    done, before = len(runs), text
    victim = next(output.glob("lora-*-seed4"))
    trajectory = untimed(victim)
    weights = read_checkpoint(victim / "last.ckpt")["state_dict"]
    for file in victim.iterdir():
        file.unlink()
    victim.rmdir()
    compare(*options)  # what is there is not repeated, and the missing run, now the first of its process, is the same
    assert len(runs) == done + 1
    assert untimed(victim) == trajectory
    state = read_checkpoint(victim / "last.ckpt")["state_dict"]
    assert all(torch.equal(v, state[k]) for k, v in weights.items() if isinstance(v, torch.Tensor))
    assert results_section((output / "report.md").read_text()) == results_section(before)

    (next(output.glob("lora-*-seed5")) / "examples.npz").unlink()
    with pytest.raises(SystemExit, match="a run of an earlier version"):
        compare(*options)
    with pytest.raises(SystemExit, match="run with other settings"):
        compare(*options, "--adapter.r", "2")
    assert len(runs) == done + 1


def untimed(folder: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((folder / "trajectory.csv").open())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def results_section(report: str) -> list[str]:
    return [line for line in report.splitlines() if line.startswith("|")]


def test_one_learning_rate_needs_no_sweep_and_a_failed_run_leaves_nothing(
    project: Path,
    runs: list[list[str]],
) -> None:
    options = ["--learning_rates", "[1e-3]", "--seeds", "[0]"]
    with pytest.raises(ZeroDivisionError):
        compare(*options, "--methods", "[milora]", "--trainer.callbacks+=helpers.failing.Fails")
    assert not list((project / "comparison").iterdir())
    compare(*options, "--methods", "[milora,gaussian x minor]", "--trainer.max_steps", "4")
    assert runs[1:] == [["milora", 1e-3, 0], ["gaussian x minor", 1e-3, 0]]
    (row, _) = csv.DictReader((project / "comparison" / "results.csv").open())
    assert row["step"] == "4"  # not a multiple of the interval: measured all the same
    assert not (project / "comparison" / "learning_forgetting.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "[milora,micah]", "--learning_rates", "[1e-3]"], r"no config 'method/micah.yaml'"),
        (["--methods", "[milora,milora]", "--learning_rates", "[1e-3]"], r"no duplicates"),
        (["--methods", "[milora]", "--learning_rates", "[]"], r"at least one"),
        (["--methods", "[milora]", "--learning_rates", "[1e-3]", "--adapter.rank", "3"], r"rank"),
        (["--methods", "[milora]"], r"learning_rates"),
        (["--methods", "[milora]", "--learning_rates", "[1e-3]", "--trainer.devices", "2"], r"trains on one device"),
        (
            [
                "--methods",
                "[milora]",
                "--learning_rates",
                "[1e-3]",
                "--data.source.validation",
                "null",
                "--data.source.validation_size",
                "0",
            ],
            r"no validation",
        ),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    project: Path,
    args: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare(*args)
    assert re.search(message, str(stopped.value.code) + capsys.readouterr().err)
    assert not list((project / "comparison").glob("*"))


class Recorded(Comparison):
    """A comparison whose runs take no time: each has the loss that belongs to its learning rate."""

    made: ClassVar[list[tuple[str, float, int, bool]]] = []
    losses: ClassVar[dict[float, float]] = {1e-3: 0.3, 1e-2: 0.2, 1e-1: 0.4}

    def parse(self, run: Run) -> Any:
        return SimpleNamespace(config=None)

    def check(self, runs: Sequence[Run]) -> None:
        self.checked = [*getattr(self, "checked", []), *(run.name for run in runs)]

    def train(self, run: Run, save: bool) -> None:
        assert run.name in self.checked
        run.rows = fake("", 0, 0, self.losses[run.learning_rate], 0).rows
        self.made.append((run.method, run.learning_rate, run.seed, save))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """The rates and seeds that are reported."""
    reported: list[tuple[float, int]] = []
    monkeypatch.setattr(comparing, "Comparison", Recorded)
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(
        report, "write_report", lambda _, runs, *__, **___: reported.extend((r.learning_rate, r.seed) for r in runs)
    )
    return reported


@pytest.mark.parametrize(
    ("given", "used"),
    [({}, [8, 9]), ({"sweep_seed": 0}, [0]), ({"sweep_seeds": [3, 1]}, [3, 1])],
    ids=["default", "one", "several"],
)
def test_rates_are_chosen_with_their_own_seeds(
    given: dict[str, Any], used: list[int], tmp_path: Path, recorded: list[tuple[float, int]]
) -> None:
    """Zero is a seed, too."""
    comparing.compare([], ["milora", "lora"], str(tmp_path), [1e-3, 1e-2, 1e-1], [5, 7], **given)
    sweep = [each for each in Recorded.made if not each[3]]
    rates = (1e-3, 1e-2, 1e-1)
    assert sweep == [(m, rate, seed, False) for m in ("milora", "lora") for rate in rates for seed in used]
    final = [each for each in Recorded.made if each[3]]
    assert final == [(method, 1e-2, seed, True) for seed in (5, 7) for method in ("milora", "lora")]
    assert recorded == [(1e-2, 5), (1e-2, 5), (1e-2, 7), (1e-2, 7)]


@pytest.mark.parametrize(
    ("losses", "limit", "tried"),
    [
        ({1e-3: 0.4, 1e-2: 0.3, 1e-1: 0.2, 1.0: 0.1, 10.0: 0.3}, 3, [1e-3, 1e-2, 1e-1, 1.0, 10.0]),
        ({1e-3: 0.4, 1e-2: 0.3, 1e-1: 0.2, 1.0: 0.1}, 1, [1e-3, 1e-2, 1e-1, 1.0]),
        ({1e-3: 0.2, 1e-2: 0.3, 1e-1: 0.4, 1e-4: 0.3}, 3, [1e-4, 1e-3, 1e-2, 1e-1]),
        ({1e-3: 0.4, 1e-2: 0.3, 1e-1: 0.2}, 0, [1e-3, 1e-2, 1e-1]),
        ({1e-3: 0.4, 1e-2: 0.3, 1e-1: 0.2, 1.0: float("nan")}, 3, [1e-3, 1e-2, 1e-1, 1.0]),
    ],
    ids=["until it turns", "limit", "downwards", "not wanted", "diverges"],
)
def test_the_grid_grows_while_the_best_rate_is_at_its_edge(
    losses: dict[float, float],
    limit: int,
    tried: list[float],
    tmp_path: Path,
    recorded: list[tuple[float, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Recorded, "losses", losses)
    comparing.compare([], ["milora"], str(tmp_path), [1e-3, 1e-2, 1e-1], [0], extend=limit)
    assert sorted({rate for _, rate, _, save in Recorded.made if not save}) == tried
    assert {rate for rate, _ in recorded} == {min((r for r in tried if losses[r] == losses[r]), key=losses.__getitem__)}


def test_seeds_that_are_reported_choose_no_rates(tmp_path: Path, recorded: list[tuple[float, int]]) -> None:
    for given in ({"sweep_seed": 7}, {"sweep_seeds": [9, 7]}):
        with pytest.raises(ValueError, match="Seed 7 is among seeds and among sweep_seeds"):
            comparing.compare([], ["milora"], str(tmp_path), [1e-3, 1e-2], [5, 7], **given)
    assert Recorded.made == []


def test_a_run_is_given_its_own_seed_rate_and_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "RunCLI", lambda arguments: arguments)
    arguments = Comparison(["--config", "mine.yaml"], {"a": ["--config", "method/a.yaml"]}, Path()).parse(
        Run("a", 3e-4, 6)
    )
    assert arguments[:4] == ["--config", "mine.yaml", "--config", "method/a.yaml"]
    assert {"--seed_everything=6", "--data.seed=6", "--model.optimizer.lr=0.0003"} <= set(arguments)


def test_the_end_of_training_is_measured_once() -> None:
    trajectory = Trajectory()
    for step, loss in ((0, 3.0), (4, 2.0), (4, 9.0), (6, 1.0)):
        trainer = SimpleNamespace(global_step=step, callback_metrics={"val_loss": torch.tensor(loss)})
        trajectory.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert [(row["step"], row["val_loss"]) for row in trajectory.rows] == [(0, 3.0), (4, 2.0), (6, 1.0)]
    assert [row["seconds"] for row in trajectory.rows] == sorted(row["seconds"] for row in trajectory.rows)


class Answered(MeasuredModule):
    """A module whose metric is given."""

    def __init__(self, metric: Metric) -> None:
        torch.nn.Module.__init__(self)
        self.metric = metric


class Half(Metric):
    """A score between right and wrong."""

    def update(self, generations: list[str], references: list[str]) -> None:
        """Do nothing."""

    def compute(self) -> torch.Tensor:
        return torch.tensor(0.5)


class Named(Half):
    def compute(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"length": torch.tensor(7.0)}


def test_a_single_answer_has_the_score_of_any_metric() -> None:
    record = {"generation": "The answer is: 4", "reference": "4", "task": ""}
    right = TaskAccuracy({"": right_answer})
    assert [Answered(metric)._score(record) for metric in (AnswerAccuracy(), right, Half())] == [1.0, 1.0, 0.5]
    assert Answered(Named())._score(record) is None
    code = {"generation": "    return 1", "reference": Problem("def f():", "f", "def check(f): f()").written()}
    assert Answered(PassRate())._score({**code, "task": ""}) == 1.0


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    for words in ("--methods", "overlays", "--learning_rates", "--seeds", "--sweep_seed", "--text", "--output"):
        assert words in text
    assert "--fit" not in text


def test_rate_with_the_lowest_finite_loss_is_chosen() -> None:
    losses = {1e-4: 0.5, 1e-3: 0.4, 1e-2: float("nan")}
    assert best_rate([fake("a", rate, 0, loss, 0.1) for rate, loss in losses.items()]) == 1e-3
    assert best_rate([]) is None
    with pytest.raises(ValueError, match="a diverges with every learning rate"):
        best_rate([fake("a", 1e-3, 0, float("inf"), 0.1)])


def test_tables_say_what_was_measured() -> None:
    a = [fake("a", 1e-3, seed, loss, 0.1) for seed, loss in enumerate((1.0, 2.0, 3.0))]
    b = [fake("b", 1e-2, seed, loss, 0.2) for seed, loss in enumerate((1.5, 1.5, 3.5))]
    sweep = [fake("a", rate, 9, loss, 0.1) for rate, loss in ((1e-3, 0.3), (1e-2, 0.2), (1e-1, 0.4))]

    def table(sweep: list[Run], given: Sequence[float] = (1e-3, 1e-2, 1e-1)) -> str:
        runs = [a[0], b[0], a[1], b[1], a[2], b[2]]
        return markdown(make_report(runs, sweep, "", "a", Margins(0.01, 0.05), given))

    text = table(sweep)
    assert "| before training |  | 2 | 0 |" in text
    assert "| a | 0.001 | 2 ± 1 | 0.1 ± 0 |" in text
    assert "| b | 0.01 | 2.167 ± 1.2 |" in text
    assert "| b | +0.167 (−1.27 to +1.6), p = 0.67: undecided | ×2 (×2 to ×2), p < 0.0001: worse |" in text
    assert "| a | 0.3000, 0.1 | [0.2000, 0.1] | 0.4000, 0.1 |" in text
    assert "edge" not in text
    for edge in (sweep[:2], sweep[1:]):  # the highest rate, and the lowest
        assert "For a the best is at the edge" in table(edge)
    assert "The grid was extended where the best rate lay at its edge: a by 0.1." in table(sweep, [1e-3, 1e-2])


def test_options_reach_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recorded] = []
    written: list[Any] = []
    parts: list[tuple[int, float | None]] = []

    class Kept(Recorded):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(comparing, "Comparison", Kept)
    monkeypatch.setattr(report, "write_report", lambda *arguments: written.append(arguments))
    monkeypatch.setattr(comparing, "set_apart", lambda run, share: parts.append((run.seed, share)))

    def run(rates: list[float], **options: Any) -> tuple[str, str]:
        for of in (made, written, parts):
            of.clear()
        comparing.compare(["--trainer.max_steps=9"], ["lora", "milora"], str(tmp_path), rates, [3], **options)
        return " ".join(made[0].fit), " ".join(made[1].fit)

    named = {"text": {"a": "a.txt"}, "text_field": "body", "text_tokens": 99, "questions": {"q": "q.json"}}
    named |= {"questions_number": 7, "questions_every": "validation", "reference": "milora", "sweep_seed": 8}
    reported, swept = run([1e-3, 1e-2], margin=0.02, margin_ratio=0.3, selection_size=0.4, **named)
    for words in ("max_steps=9", "UpdateMonitor", "text={'a': 'a.txt'}", "field=body", "max_tokens=99"):
        assert words in reported
        assert words in swept
    for words in ("ChoiceMonitor", "questions={'q': 'q.json'}", "number=7", "every=validation"):
        assert words in reported
    assert "ChoiceMonitor" not in swept
    assert "num_generation_examples=0" in swept
    assert "num_generation_examples" not in reported
    assert written[0][4:] == ("milora", Margins(0.02, 0.3), [1e-3, 1e-2])
    assert set(parts) == {(8, 0.4), (3, 0.4)}

    _, swept = run([1e-3, 1e-2], selection="chosen.jsonl", sweep_seed=8)
    assert "validation=chosen.jsonl" in swept
    assert "validation=chosen.jsonl" not in " ".join(made[0].fit)
    assert set(parts) == {(8, 1.0), (3, None)}  # of other data nothing has to be kept back
    assert written[0][4] == "lora"

    run([1e-3])
    assert set(parts) == {(3, None)}  # nothing is chosen
    for wrong in (
        {"selection_size": 1.0},
        {"margin": 0.0},
        {"margin_ratio": 0.0},
        {"margin_ratio": math.inf},
        {"extend": -1},
        {"parallel": 0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            run([1e-3], **wrong)
