"""When callbacks measure, save and stop, as one of several processes too, without a Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.models import tiny_model

from milora_lightning import ChoiceMonitor, ForgettingMonitor, SubspaceMonitor
from milora_lightning.callbacks.interruption import SaveOnInterrupt
from milora_lightning.data.tasks.questions import read_questions


class Run:
    """A run of one process or of two, as callbacks see it."""

    def __init__(self, folder: Path, world: int = 1, accumulated: int = 1, other: bool = False) -> None:
        self.saved: list[tuple[int, str]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

        def agreed(own: bool, all: bool) -> bool:
            return (own and other) if all else (own or other)

        strategy = SimpleNamespace(reduce_boolean_decision=agreed, broadcast=lambda value: value)
        logger = SimpleNamespace(log_metrics=lambda values, step: self.logged.append((step, dict(values))))
        self.module = tiny_model()
        self.module.log_dict = lambda values: self.logged.append((-1, dict(values)))
        self.trainer: Any = SimpleNamespace(
            world_size=world, accumulate_grad_batches=accumulated, strategy=strategy, loggers=[logger], global_step=0
        )
        vars(self.trainer).update(default_root_dir=str(folder), checkpoint_callbacks=[], log_every_n_steps=5)
        self.trainer.save_checkpoint = lambda path: self.saved.append((self.trainer.global_step, Path(path).name))

    def batch(self, callback: SaveOnInterrupt, step: int) -> None:
        """Train a batch, after which there have been so many steps."""
        callback.on_train_batch_start(self.trainer, None, None, 0)  # type: ignore[arg-type]
        self.trainer.global_step = step
        callback.on_train_batch_end(self.trainer, None, None, None, 0)  # type: ignore[arg-type]


def test_a_step_of_several_batches_is_finished_before_it_is_saved(tmp_path: Path) -> None:
    (tmp_path / "interrupted.ckpt").touch()
    run, callback = Run(tmp_path, accumulated=3), SaveOnInterrupt()
    run.batch(callback, 0)
    callback.interrupted = True
    run.batch(callback, 0)
    assert run.saved == []
    with pytest.raises(KeyboardInterrupt):
        run.batch(callback, 1)
    assert run.saved == [(1, "interrupted-v1.ckpt")]  # no earlier file is written over


def test_batches_after_which_a_module_takes_no_step_are_interrupted_too(tmp_path: Path) -> None:
    run, callback = Run(tmp_path), SaveOnInterrupt()
    callback.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        run.batch(callback, 0)
    assert run.saved == [(0, "interrupted.ckpt")]


@pytest.mark.parametrize("own", [True, False])
def test_processes_stop_together_when_one_of_them_is_interrupted(own: bool, tmp_path: Path) -> None:
    run, callback = Run(tmp_path, world=2, other=not own), SaveOnInterrupt()
    callback.interrupted = own
    for step in (3, 4):  # they ask one another at every fifth step
        run.batch(callback, step)
    assert run.saved == []
    with pytest.raises(KeyboardInterrupt):
        run.batch(callback, 5)
    assert run.saved == [(5, "interrupted.ckpt")]
    assert callback.interrupted


def test_without_an_interruption_nothing_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, world=2)
    callback = SaveOnInterrupt()
    for step in range(1, 11):
        run.batch(callback, step)
    assert run.saved == []


def asked(folder: Path) -> Path:
    rows = [{"question": f"What is {i}?", "choices": ["1", "2"], "answer": i % 2} for i in range(20)]
    (folder / "sums.json").write_text(json.dumps(rows))
    return folder / "sums.json"


@pytest.mark.parametrize(("every", "steps"), [("end", [-1, 0, 9]), ("validation", [-1, 0, -1])])
def test_questions_are_asked_before_training_and_then_as_often_as_is_wished(
    every: Any, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice with the same callback: each run has values of its own from before training."""
    monitor = ChoiceMonitor(str(asked(tmp_path)), every=every)
    numbers = iter(range(100))

    def measure(*_: Any) -> dict[str, float]:
        monitor.results = {"loss": float(next(numbers))}
        return monitor.results

    monkeypatch.setattr(monitor, "measure", measure)
    for sanity in (True, False):
        run = Run(tmp_path)
        at: Any = (run.trainer, run.module)
        monitor.on_fit_start(*at)
        if sanity:
            run.trainer.sanity_checking = True
            monitor.on_validation_epoch_end(*at)
        run.trainer.sanity_checking = False
        monitor.on_train_start(*at)
        run.trainer.global_step = 9
        monitor.on_validation_epoch_end(*at)
        monitor.on_train_end(*at)
        monitor.on_fit_end(*at)
        assert [step for step, _ in run.logged] == (steps if sanity else steps[1:])
        values = [found["loss"] for _, found in run.logged]
        assert values == ([0, 0, 1] if sanity else [2, 3])
    resumed = Run(tmp_path)
    resumed.trainer.global_step = 4
    monitor.on_train_start(resumed.trainer, None)  # type: ignore[arg-type]
    assert resumed.logged == []


@pytest.mark.parametrize("sanity", [True, False])
def test_forgetting_before_training_is_that_of_the_run_which_begins(
    sanity: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run of a monitor may have another model, and no sanity check to measure it."""
    monitor = ForgettingMonitor(str(tmp_path / "text.txt"))
    numbers = iter(range(100))
    monkeypatch.setattr(monitor, "measure", lambda *_: {"kl": float(next(numbers))})
    for checks, value in ((True, 0.0), (sanity, 1.0)):
        run = Run(tmp_path)
        at: Any = (run.trainer, run.module)
        monitor.on_fit_start(*at)
        run.trainer.sanity_checking = True
        if checks:
            monitor.on_validation_epoch_end(*at)
        run.trainer.sanity_checking = False
        monitor.on_train_start(*at)
        assert run.logged[-1] == (0, {"kl": value})


def test_what_is_asked_and_read_is_what_the_options_say(tmp_path: Path) -> None:
    path, trainer = str(asked(tmp_path)), SimpleNamespace(strategy=None, callbacks=[])
    for number, seed in ((3, 0), (3, 1), (7, 1)):
        monitor = ChoiceMonitor({"sums": path}, number=number, seed=seed)
        monitor.setup(trainer, None, "fit")  # type: ignore[arg-type]
        assert monitor._questions == {"sums": read_questions(path, number, seed)}
        assert len(monitor._questions["sums"]) == number
    assert read_questions(path, 3, 0) != read_questions(path, 3, 1)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "no", "body": "yes"}) + "\n")
    texts = ForgettingMonitor({"a": str(tmp_path / "text.jsonl")}, field="body")
    texts.setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert texts._texts == {"a": ["yes"]}


def test_what_was_measured_at_a_checkpoint_is_not_measured_again_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of several batches: before the first one to come, the step is still that of the checkpoint."""
    run, monitor, measured = Run(tmp_path), SubspaceMonitor(every_n_steps=5), list[int]()
    monkeypatch.setattr(monitor, "measure", lambda module: measured.append(run.trainer.global_step) or {})
    vars(run.trainer).update(is_global_zero=True, loggers=[])
    module: Any = SimpleNamespace(log_dict=lambda *_, **__: None, modules=lambda: iter(()))
    module.named_modules = lambda: iter(())
    run.trainer.global_step = 5
    monitor.on_train_start(run.trainer, module)
    for step in (5, 6, 9, 10, 10, 11):
        run.trainer.global_step = step
        monitor.on_train_batch_end(run.trainer, module, None, None, 0)
    assert measured == [10]
