"""How long a run will still take, with a limit of time and without."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.models import quiet_trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.demos.boring_classes import BoringModel

from milora_lightning.training.remaining import evaluations, seconds_left


def left_after_each_step(folder: Path, step: float, **options: Any) -> list[float | None]:
    left: list[float | None] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            left.append(seconds_left(trainer, step=step, evaluation=100.0))
            trainer.should_stop = len(left) == 4

    callbacks = [Watch(), *options.pop("callbacks", [])]
    limits = {"limit_train_batches": 8, "num_sanity_val_steps": 0, "enable_model_summary": False}
    quiet_trainer(folder, callbacks=callbacks, **limits, **options).fit(BoringModel())
    return left


@pytest.mark.parametrize("validations", [0, 1])
def test_without_validations_only_steps_take_time(validations: int, tmp_path: Path) -> None:
    left = left_after_each_step(tmp_path, 1.0, max_epochs=1, limit_val_batches=validations)
    assert left == [7 - i + 100 * validations for i in range(4)]


def test_the_sooner_end_counts(tmp_path: Path) -> None:
    """Of a run with a number of steps and a limit of time, an hour here."""
    options: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0}
    short = left_after_each_step(tmp_path, 1.0, callbacks=[Timer(duration={"hours": 1})], **options)
    assert short == [7, 6, 5, 4]
    long = left_after_each_step(tmp_path, 1e6, callbacks=[Timer(duration={"hours": 1})], **options)
    assert all(each is not None and 1800 < each <= 3600 for each in long)
    assert len(long) == 4


def test_a_run_without_an_end_has_no_time_left(tmp_path: Path) -> None:
    assert left_after_each_step(tmp_path, 1.0, max_epochs=-1, limit_val_batches=0) == [None] * 4


def counted(batches: int, epoch: int, every: int, epochs: int | None) -> int:
    """Evaluations within the first batches of a run, one by one."""
    found = 0
    for batch in range(1, batches + 1):
        place, past = (batch, 0) if epochs is None else ((batch - 1) % epoch + 1, (batch - 1) // epoch)
        found += place % every == 0 and (epochs is None or (past + 1) % epochs == 0)
    return found


def test_evaluations_are_counted_as_they_come() -> None:
    for case in product(range(13), (4, 5), (1, 2, 3, 4), (1, 2, 3, None)):
        assert evaluations(*case) == counted(*case), case
    assert evaluations(12, 4, math.inf, 1) == evaluations(math.inf, 4, 2, 1) == 0


@pytest.mark.parametrize("accumulated", [1, 2])
def test_evaluations_that_have_been_take_no_more_time(accumulated: int) -> None:
    loop = SimpleNamespace(max_batches=40, epoch_loop=SimpleNamespace(total_batch_idx=24 * accumulated - 1))
    trainer: Any = SimpleNamespace(
        limit_train_batches=1.0, estimated_stepping_batches=40, max_epochs=1, max_steps=-1, callbacks=[], fit_loop=loop
    )
    vars(trainer).update(num_training_batches=40 * accumulated, accumulate_grad_batches=accumulated, global_step=24)
    vars(trainer).update(val_check_batch=10 * accumulated, check_val_every_n_epoch=1, enable_validation=True)
    trainer.num_val_batches = [3]
    assert seconds_left(trainer, step=1.0, evaluation=100.0) == 16 + 200


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_time_left_counts_the_evaluations_to_come(tmp_path: Path, accumulate: int) -> None:
    left: list[float | None] = []
    due: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            left.append(seconds_left(trainer, step=1.0, evaluation=100.0))
            due.append(0)

        def on_validation_start(self, *_: Any) -> None:
            due[-1] += 1

    limits = {"limit_train_batches": 8, "limit_val_batches": 1, "val_check_interval": 3, "max_epochs": 2}
    options = {"accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0}
    quiet_trainer(tmp_path, callbacks=[Watch()], **limits, **options).fit(BoringModel())
    # What fell due after each batch but the one that has just ended, whose evaluation is going to be shown by itself.
    for batch, seconds in enumerate(left):
        steps = 16 // accumulate - (batch + 1) // accumulate
        assert seconds == steps + 100 * sum(due[batch + 1 :])
