"""How fast a run trains, by a clock that the test sets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model
from helpers.modules import data, module
from lightning.pytorch import Callback, LightningModule, Trainer

from milora_lightning import MiLoRAInit
from milora_lightning.screen import pace
from milora_lightning.screen.pace import Pace
from milora_lightning.training import throughput
from milora_lightning.training.throughput import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def read(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for name in (throughput, pace):
        monkeypatch.setattr(name, "time", SimpleNamespace(perf_counter=clock.read, monotonic=clock.read))
    return clock


def test_tokens_are_those_of_the_batch_that_took_the_time(clock: Clock) -> None:
    """A batch is added before it is computed: what passes until the next one is its own time."""
    speed = Throughput()
    assert speed.add(torch.tensor(30)) is None
    clock.now += 3
    assert speed.add(torch.tensor(500)) == 10
    clock.now += 5
    assert speed.add(torch.tensor(1)) == 100
    speed.pause()
    clock.now += 1000
    assert speed.add(torch.tensor(40)) is None
    clock.now += 2
    assert speed.add(torch.tensor(7)) == 20


def test_evaluations_and_padding_do_not_count_as_training(clock: Clock, tmp_path: Path) -> None:
    counted: list[float] = []
    found: dict[int, float] = {}

    class Time(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, number: int) -> None:
            counted.append(float(sum(len(row[row != lm.tokenizer.pad_token_id]) for row in batch["input_ids"])))

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            clock.now += 2
            if "tokens_per_second" in trainer.callback_metrics:
                found[len(counted) - 1] = trainer.callback_metrics["tokens_per_second"].item()

        def on_validation_batch_end(self, *_: Any) -> None:
            clock.now += 1000

    llama = save_tiny_model(tmp_path / "llama", "llama")
    lm = module(llama)
    trainer = quiet_trainer(
        tmp_path, max_steps=6, val_check_interval=3, num_sanity_val_steps=0, callbacks=[MiLoRAInit(r=4), Time()]
    )
    trainer.fit(lm, data(tmp_path, llama, num_generation_examples=0))
    assert len(set(counted)) > 1
    for number, measured in ((1, 0), (2, 1), (3, 1), (4, 3), (5, 4)):  # 3 comes after an evaluation, and tells nothing
        assert found[number] == pytest.approx(counted[measured] / 2)


def test_the_pace_drops_the_very_first_step_and_pauses(clock: Clock) -> None:
    steps = Pace()
    assert steps.seconds is None
    steps.start()
    clock.now += 60  # libraries are loaded
    steps.lap(1)
    assert steps.seconds == 60
    for seconds in (2, 4):
        clock.now += seconds
        steps.start()  # under way already
        steps.lap(1)
    assert steps.seconds == 3
    steps.pause()
    clock.now += 1000
    steps.start()
    clock.now += 6
    steps.lap(2)
    assert steps.seconds == 3
