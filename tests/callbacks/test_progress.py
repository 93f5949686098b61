"""What a run has its screen show: where training is, what else goes on, and when all will have ended."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.clock import Clock
from helpers.models import quiet_trainer, tiny_model
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from milora_lightning.callbacks import progress
from milora_lightning.callbacks.progress import RunProgress
from milora_lightning.screen.state import RunState


def test_tokens_of_an_answer_are_counted_and_passes_of_monitors_after_it_are_not() -> None:
    module: Any = nn.ModuleDict({"model": tiny_model("llama")})
    trainer: Any = SimpleNamespace(sanity_checking=False, num_val_batches=[2])
    ids = torch.tensor([[5, 6, 7]])
    bar = RunProgress()
    bar.disable()
    bar.on_validation_start(trainer, module)
    work = bar.state.work
    assert work is not None
    notes = []
    for number, batch in enumerate(({"input_ids": ids}, {"input_ids": ids, "reference": ["a", "b"]})):
        bar.on_validation_batch_start(trainer, module, batch, number)
        for _ in range(3):
            module["model"](ids)
        notes.append(work.note)
        bar.on_validation_batch_end(trainer, module, None, batch, number)
        module["model"](ids)
        notes.append(work.note)
    assert notes == ["", "", "answering 2 prompts at token 3", ""]
    assert work.done == 2


class Quiet(RunProgress):
    """Keeps what it prints, and draws nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.printed: list[str] = []
        self.disable()

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.printed += map(str, args)


def run(**attributes: Any) -> Any:
    """A Trainer in training, of which the callback reads this."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.25}, {"lr": 0.5}])
    defaults = {"global_step": 0, "sanity_checking": False, "num_val_batches": [2, 1], "num_sanity_val_batches": [2, 0]}
    more = {"num_test_batches": [4], "num_predict_batches": [2, 3], "progress_bar_metrics": {}, "max_steps": 10}
    state = {"strategy": strategy, "optimizers": [optimizer], "should_stop": False, "limit_train_batches": 1.0}
    return SimpleNamespace(**{**defaults, **more, **state, "ckpt_path": None, **attributes})


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 10 steps, of which each is one more second and an evaluation at the end its own time."""
    monkeypatch.setattr(progress, "run_length", lambda trainer: trainer.max_steps)
    monkeypatch.setattr(progress, "loss_of_step", lambda trainer, module, outputs: outputs)
    left = lambda trainer, step, evaluation: (trainer.max_steps - trainer.global_step) * step + evaluation  # noqa: E731
    monkeypatch.setattr(progress, "seconds_left", left)


def train(bar: RunProgress, trainer: Any, clock: Clock, *times: float, loss: float = 1.0) -> None:
    """Take a step that ends at each of these times."""
    module: Any = nn.Module()
    for at in times:
        bar.on_train_batch_start(trainer, module, None, 0)
        clock(at)
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, module, torch.tensor(loss), None, 0)


@pytest.mark.usefixtures("imitated")
def test_the_end_is_what_steps_and_evaluations_have_taken(clock: Clock) -> None:
    """The first step does not count, and an evaluation is not a step; one that has begun delays the end by itself."""
    bar, trainer, module = Quiet(), run(), nn.Module()
    bar.on_train_start(trainer, module)  # type: ignore[arg-type]
    assert bar.state.training is not None
    assert (bar.state.training.total, bar.state.training.done) == (10, 0)
    train(bar, trainer, clock, 9.0, 11.0, 13.0)
    assert bar.state.steps == 0.5
    assert bar.state.end == 100 + 13 + 7 * 2
    bar.on_validation_start(trainer, module)  # type: ignore[arg-type]
    assert bar.state.work is not None
    assert (bar.state.work.name, bar.state.work.total, bar.state.work.unit) == ("Validating", 3, "batches")
    clock(43.0)
    bar.on_validation_end(trainer, module)  # type: ignore[arg-type]
    assert bar.state.work is None
    assert bar.state.end == 100 + 43 + 7 * 2
    train(bar, trainer, clock, 45.0)
    assert bar.state.steps == 0.5
    assert bar.state.end == 100 + 45 + 6 * 2 + 30
    bar.on_validation_start(trainer, module)  # type: ignore[arg-type]
    assert bar.state.end == 100 + 45 + 6 * 2 + 2 * 30  # this one, and one more
    clock(55.0)
    bar.on_validation_end(trainer, module)  # type: ignore[arg-type]
    assert bar.state.end == 100 + 55 + 6 * 2 + 30


@pytest.mark.usefixtures("imitated")
@pytest.mark.parametrize(("batches", "counts"), [([2, 0], False), ([2, 1], True)])
def test_an_evaluation_before_training_is_a_measure_if_it_is_whole(
    batches: list[int], counts: bool, clock: Clock
) -> None:
    bar, module = Quiet(), nn.Module()
    trainer = run(sanity_checking=True, num_sanity_val_batches=batches)
    bar.on_validation_start(trainer, module)  # type: ignore[arg-type]
    assert bar.state.work is not None
    assert (bar.state.work.name, bar.state.work.total) == ("Evaluating before training", sum(batches))
    clock(30.0)
    bar.on_validation_end(trainer, module)  # type: ignore[arg-type]
    trainer.sanity_checking = False
    bar.on_train_start(trainer, module)  # type: ignore[arg-type]
    train(bar, trainer, clock, 32.0)
    assert bar.state.end == 100 + 32 + 9 * 2 + (30 if counts else 0)


@pytest.mark.usefixtures("imitated")
def test_figures_are_read_twice_a_second_and_at_the_last_step(clock: Clock) -> None:
    bar, trainer = Quiet(), run(max_steps=4)
    bar.on_train_start(trainer, nn.Module())  # type: ignore[arg-type]
    train(bar, trainer, clock, 10.0, loss=8.0)
    assert bar.state.loss == 8
    train(bar, trainer, clock, 10.4, loss=2.0)
    assert bar.state.loss == 8
    train(bar, trainer, clock, 10.5, loss=2.0)
    between = bar.state.loss
    assert between is not None
    assert 2 < between < 8
    train(bar, trainer, clock, 10.6, loss=0.0)
    assert bar.state.loss is not None
    assert bar.state.loss < between


@pytest.mark.usefixtures("imitated")
def test_what_a_module_logs_is_shown_unless_it_has_a_place_of_its_own(clock: Clock) -> None:
    bar, trainer = Quiet(), run(optimizers=[])
    bar.on_train_start(trainer, nn.Module())  # type: ignore[arg-type]
    logged = {"loss": 5.0, "v_num": "abc", "accuracy": 0.5, "lr": 1.0, "tokens_per_second": 100.0}
    trainer.progress_bar_metrics = logged
    trainer.global_step = 1
    bar.on_train_batch_end(trainer, nn.Module(), None, None, 0)  # type: ignore[arg-type]
    assert bar.state.metrics == {"accuracy": 0.5}
    assert (bar.state.loss, bar.state.tokens, bar.state.rate) == (5.0, 100.0, None)
    clock(1.0)
    trainer.progress_bar_metrics = {**logged, "train_loss": 3.0, "tokens_per_second": 200.0}
    bar.on_train_batch_end(trainer, nn.Module(), None, None, 0)  # type: ignore[arg-type]
    assert (bar.state.loss, bar.state.tokens) == (3.0, pytest.approx(110.0))
    clock(2.0)
    trainer.optimizers = run().optimizers
    bar.on_train_batch_end(trainer, nn.Module(), torch.tensor(2.0), None, 0)  # type: ignore[arg-type]
    assert (bar.state.loss, bar.state.rate) == (2.0, 0.25)


@pytest.mark.usefixtures("imitated")
@pytest.mark.parametrize("before", [0, 4])
def test_training_is_summed_up_if_there_was_any(before: int, clock: Clock) -> None:
    bar, trainer = Quiet(), run(global_step=before)
    bar.on_train_start(trainer, nn.Module())  # type: ignore[arg-type]
    bar.on_train_end(trainer, nn.Module())  # type: ignore[arg-type]
    assert bar.printed == []
    bar.on_train_start(trainer, nn.Module())  # type: ignore[arg-type]
    train(bar, trainer, clock, 61.0, 62.0)
    bar.on_train_end(trainer, nn.Module())  # type: ignore[arg-type]
    (line,) = bar.printed
    assert line.startswith(f"Trained {before + 2} of 10 steps in 0:01:02: loss 1, peak ")
    assert bar.state.training is bar.state.end is None
    bar.on_train_start(trainer, nn.Module())  # type: ignore[arg-type]
    assert bar.state.steps is bar.state.tokens is None  # of another run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, True),
        ({"ckpt_path": None}, False),
        ({"should_stop": True}, False),
        ({"limit_train_batches": 0}, False),
    ],
)
def test_a_resumed_run_without_a_step_is_explained(more: dict[str, Any], said: bool) -> None:
    bar, trainer = Quiet(), run(**{"ckpt_path": "last.ckpt", "global_step": 1234, **more})
    bar.on_fit_start(trainer, nn.Module())  # type: ignore[arg-type]
    bar.on_fit_end(trainer, nn.Module())  # type: ignore[arg-type]
    assert ["at step 1,234" in line for line in bar.printed] == [True] * said
    bar.on_train_batch_start(trainer, nn.Module(), None, 0)  # type: ignore[arg-type]
    bar.printed.clear()
    bar.on_fit_end(trainer, nn.Module())  # type: ignore[arg-type]
    assert bar.printed == []
    bar.on_fit_start(trainer, nn.Module())  # type: ignore[arg-type]
    bar.on_fit_end(trainer, nn.Module())  # type: ignore[arg-type]
    assert bool(bar.printed) is said


def test_work_before_training_is_counted() -> None:
    bar = Quiet()
    weights: Any = [[("a.q_proj", None), ("a.k_proj", None)], [("b.up_proj", None)]]
    seen = []
    for _ in bar.initializing(weights):
        assert bar.state.work is not None
        seen.append((bar.state.work.count, bar.state.work.name))
    assert seen == [
        ("0 of 3 matrices, a.q_proj", "Initializing adapters"),
        ("2 of 3 matrices, b.up_proj", "Initializing adapters"),
    ]
    assert bar.state.work is not None
    assert bar.state.work.name == "Checking the adapters"
    assert list(bar.initializing([])) == []
    assert [(number, bar.state.work.count) for number in bar.measuring([3, 5])] == [
        (3, "0 of 2 batches"),
        (5, "1 of 2 batches"),
    ]


@pytest.mark.parametrize(("stage", "name", "total"), [("test", "Testing", 4), ("predict", "Predicting", 5)])
def test_other_evaluations_have_names_and_lengths_too(stage: str, name: str, total: int) -> None:
    bar, module = Quiet(), nn.Module()
    trainer: Any = run()
    getattr(bar, f"on_{stage}_start")(trainer, module)
    work = bar.state.work
    assert work is not None
    assert (work.name, work.count) == (name, f"0 of {total} batches")
    getattr(bar, f"on_{stage}_batch_start")(trainer, module, {"reference": ["a"]}, 0)
    assert work.note == "answering 1 prompt"
    getattr(bar, f"on_{stage}_batch_end")(trainer, module, None, None, 0)
    assert work.count == f"1 of {total} batches"
    getattr(bar, f"on_{stage}_end")(trainer, module)
    assert bar.state.work is None


def test_one_display_is_opened_at_the_first_work_and_by_the_first_process_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def open_view(state: RunState) -> Any:
        calls.append(f"open {state.work.name if state.work else None}")
        return SimpleNamespace(stop=lambda: calls.append("stop"), tick=lambda: calls.append("tick"))

    monkeypatch.setattr(progress, "open_view", open_view)
    bar: Any = RunProgress()
    bar.setup(SimpleNamespace(is_global_zero=True), None, "fit")
    bar.begin("Loading more")
    list(bar.measuring([1]))
    bar.print("said")
    bar.teardown(None, None, "fit")
    bar.stop()
    assert calls == ["open Loading the model", "tick", "stop"]
    calls.clear()
    bar.setup(SimpleNamespace(is_global_zero=True), None, "test")
    bar.on_exception(None, None, OSError())
    assert calls == ["open Loading the model", "stop"]
    calls.clear()
    bar.disable()
    assert not bar.is_enabled
    bar.begin("hidden")
    bar.print("unsaid")
    bar.enable()
    assert bar.is_enabled
    other: Any = RunProgress()
    other.setup(SimpleNamespace(is_global_zero=False), None, "fit")
    assert calls == []
    assert not other.is_enabled
    assert capsys.readouterr().out == "said\n"


def test_any_module_has_its_progress_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = RunProgress()
    options = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 1, "enable_model_summary": False}
    trainer = Trainer(callbacks=[bar], logger=False, default_root_dir=tmp_path, enable_checkpointing=False, **options)
    trainer.fit(BoringModel())
    assert re.search(r"Trained 4 of 4 steps in 0:00:\d\d: loss \S+, peak \S+ GB", capsys.readouterr().out)
    assert bar.state.rate == pytest.approx(0.01)  # BoringModel's schedule has stepped
    assert bar.state.steps is not None


@pytest.mark.parametrize("more", [0, 1])
def test_a_finished_run_that_is_resumed_says_that_nothing_was_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: int
) -> None:
    first = quiet_trainer(tmp_path, limit_train_batches=2, max_epochs=1)
    first.fit(BoringModel())
    first.save_checkpoint(tmp_path / "done.ckpt")
    again = quiet_trainer(
        tmp_path, limit_train_batches=2, max_epochs=1 + more, callbacks=[RunProgress()], enable_progress_bar=True
    )
    capsys.readouterr()
    again.fit(BoringModel(), ckpt_path=str(tmp_path / "done.ckpt"))
    said = capsys.readouterr().out
    assert ("Nothing was left to train: the checkpoint is at step 2," in said) == (not more)
    assert ("Trained 4 of 4 steps" in said) == bool(more)
