"""A Trainer's options are the user's own between runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.models import quiet_trainer

from milora_lightning.data.batches.step_batch import StepBatch, StepOptions


@pytest.mark.parametrize("by_hand", [4, 3, 1])
def test_an_option_set_by_hand_after_a_run_stays_whatever_the_run_had_set(by_hand: int, tmp_path: Path) -> None:
    trainer, options = quiet_trainer(tmp_path, limit_train_batches=2), StepOptions()
    options.accumulate(trainer, StepBatch(1, 2, 4))
    options.count_steps(trainer, StepBatch(1, 2, 4), 40)
    assert (trainer.accumulate_grad_batches, trainer.limit_train_batches) == (4, 8)
    options.restore(trainer)
    assert (trainer.accumulate_grad_batches, trainer.limit_train_batches) == (1, 2)
    trainer.accumulate_grad_batches, trainer.limit_train_batches = by_hand, 2 * by_hand
    options.restore(trainer)  # by the next run, whose data leave the step to the Trainer
    assert (trainer.accumulate_grad_batches, trainer.limit_train_batches) == (by_hand, 2 * by_hand)
