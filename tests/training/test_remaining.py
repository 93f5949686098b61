"""How long a run will still take, with a limit of time and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.models import quiet_trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.demos.boring_classes import BoringModel

from milora_lightning.training.remaining import seconds_left


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
