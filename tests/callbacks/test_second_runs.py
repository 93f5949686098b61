"""A callback that is used for a second run knows nothing of the first."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model, write_examples
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from milora_lightning import CausalLMModule, EvaluationSummary, SFTDataModule
from milora_lightning.callbacks.interruption import SaveOnInterrupt
from milora_lightning.data import Files


class Presses(Callback):
    """Presses Ctrl-C in a step, or in a validation."""

    def __init__(self) -> None:
        self.where = "step"

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if self.where == "step" and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.where == "validation" and trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)


def test_each_interrupted_run_is_saved_in_its_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = torch.utils.data.DataLoader(torch.randn(8, 32))  # type: ignore[arg-type]
    save, presses = SaveOnInterrupt(), Presses()
    for where, step in (("step", 3), ("validation", 4)):
        presses.where = where
        settings = {"max_epochs": 1, "limit_val_batches": 1, "val_check_interval": 4, "num_sanity_val_steps": 0}
        trainer = quiet_trainer(tmp_path / where, callbacks=[save, presses], **settings)
        with pytest.raises(SystemExit):
            trainer.fit(BoringModel(), loader, loader)
        path = tmp_path / where / "interrupted.ckpt"
        assert torch.load(path, weights_only=True)["global_step"] == step
        assert f"Interrupted at step {step}. Saved in {path}" in capsys.readouterr().err


def test_results_of_an_earlier_run_are_not_those_of_this_one(tmp_path: Path) -> None:
    rows, base = write_examples(tmp_path / "rows.jsonl", 4), save_tiny_model(tmp_path / "model", "llama")
    summary = EvaluationSummary()
    for checks in (-1, 0):
        source = Files(str(rows), str(rows))
        data = SFTDataModule(
            source, str(base), batch_size=2, num_generation_examples=2, template="plain", max_length=64
        )
        trainer = quiet_trainer(tmp_path, callbacks=[summary], max_steps=1, num_sanity_val_steps=checks)
        trainer.fit(CausalLMModule(str(base), max_new_tokens=3), data)
        assert bool(summary.before) == bool(checks)
        assert not summary.after
        assert bool(summary.shown) == bool(checks)
