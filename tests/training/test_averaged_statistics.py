"""Averaging of weights recomputes the statistics of norms that train, and of no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.callback_modules import Regression
from helpers.models import quiet_trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor

from milora_lightning import MiLoRAInit


class Counting(Regression):
    """A network whose norm has statistics before it is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.setup("fit")
        self.net(torch.randn(64, 12))
        self.batches = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.batches += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("trains", [False, True])
def test_frozen_statistics_are_kept_and_take_no_further_epoch(trains: bool, tmp_path: Path) -> None:
    module = Counting()
    before = {name: buffer.clone() for name, buffer in module.net[1].named_buffers()}
    adapters = MiLoRAInit(r=2, cache=False, modules_to_save=["net.1"] if trains else None)
    averaging = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    options = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 0}
    quiet_trainer(tmp_path, callbacks=[averaging, adapters], **options).fit(module)
    kept = [torch.equal(buffer, before[name]) for name, buffer in module.net[1].named_buffers()]
    assert kept == [not trains] * 3
    assert module.batches == 3 * (2 + trains)
