"""Ctrl-C in a run: the step is finished, what has been trained is saved, and the run goes on from there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from milora_lightning.callbacks.interruption import SaveOnInterrupt
from milora_lightning.checkpoint.options import find_checkpoint
from milora_lightning.cli.ending import ending
from milora_lightning.cli.trainer_defaults import earlier_checkpoints


class Interrupts(Callback):
    """Presses Ctrl-C in a training step, or in an evaluation."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.where == "step" and trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.where == "evaluation" and trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)


class Model(BoringModel):
    """Trains with an optimizer that has a state."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.mark.parametrize("where", ["step", "evaluation"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, where: str, accumulate: int) -> None:
    def trainer(*callbacks: Callback) -> Trainer:
        limits = {"limit_train_batches": 16, "limit_val_batches": 2, "val_check_interval": 4}
        options = {"max_epochs": 1, "accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0, **limits}
        return quiet_trainer(tmp_path, callbacks=list(callbacks), **options)

    # The same batch every time, because a plain loader begins anew in a resumed epoch.
    loader = torch.utils.data.DataLoader([torch.linspace(-1, 1, 32)] * 16)
    models = []
    for _ in range(3):
        torch.manual_seed(0)
        models.append(Model())
    whole, interrupted, resumed = models
    trainer().fit(whole, loader, loader)
    with pytest.raises(SystemExit):
        trainer(SaveOnInterrupt(), Interrupts(where)).fit(interrupted, loader, loader)
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    assert not torch.equal(interrupted.layer.weight, whole.layer.weight)
    trainer().fit(resumed, loader, loader, ckpt_path=str(tmp_path / "interrupted.ckpt"))
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    # another run that is interrupted leaves the file of the first
    saved = (tmp_path / "interrupted.ckpt").read_bytes()
    with pytest.raises(SystemExit):
        trainer(SaveOnInterrupt(), Interrupts(where)).fit(Model(), loader, loader)
    assert (tmp_path / "interrupted.ckpt").read_bytes() == saved
    assert (tmp_path / "interrupted-v1.ckpt").is_file()


@pytest.mark.parametrize("ends", [OSError, KeyboardInterrupt])
def test_ctrl_c_means_what_it_did_after_a_run_that_broke_off(ends: type[BaseException], tmp_path: Path) -> None:
    """In a notebook, it was swallowed once after an error, and ended the process after an interruption."""

    class Failing(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ends

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((OSError, SystemExit)):
            quiet_trainer(tmp_path, max_steps=1, callbacks=[SaveOnInterrupt()]).fit(Failing())
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("saving", [{"filename": "last"}, {"save_last": True}, {"save_last": True, "monitor": "x"}])
def test_the_newest_run_is_what_last_means_and_no_earlier_file_is_written_over(
    tmp_path: Path, saving: dict[str, Any]
) -> None:
    """Of three runs into one folder, the second interrupted before its own first checkpoint, the third going on."""
    loader = torch.utils.data.DataLoader([torch.linspace(-1, 1, 32)] * 8)
    limits = {"limit_val_batches": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": True}

    def run(*callbacks: Callback, **options: Any) -> tuple[Trainer, list[str]]:
        saves = ModelCheckpoint(tmp_path, **saving, save_on_train_epoch_end=True)
        trainer = quiet_trainer(tmp_path, callbacks=[saves, *callbacks], **limits)
        said = earlier_checkpoints(trainer, options.get("ckpt_path"))
        model = Model()
        model.on_train_epoch_end = lambda: model.log("x", torch.tensor(1.0))
        trainer.fit(model, loader, **options)
        return trainer, said

    def step_of(path: str | Path) -> int:
        return int(torch.load(path, weights_only=False)["global_step"])

    first, said = run()
    assert not said
    assert (tmp_path / "last.ckpt").is_file()
    before = {path: path.read_bytes() for path in tmp_path.glob("*.ckpt")}
    with pytest.raises(SystemExit):
        run(SaveOnInterrupt(), Interrupts("step"))
    assert {path: path.read_bytes() for path in before} == before
    newest = find_checkpoint(first, "last", "fit")
    assert step_of(newest) == 5
    resumed, said = run(ckpt_path="last")
    assert not said  # the run goes on, and knows its files
    assert {path: path.read_bytes() for path in before} == before
    assert find_checkpoint(resumed, "last", "fit") == newest
    assert step_of(newest) == 8
    assert any("(step 8)" in line and Path(newest).name in line for line in ending(resumed))
    again, (line,) = run()
    assert "which are kept" in line
    assert find_checkpoint(again, "last", "fit") != newest
    assert {path: path.read_bytes() for path in before} == before


def test_steps_after_the_last_checkpoint_are_told(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.randn(8, 32))  # type: ignore[arg-type]
    for steps, lost in ((5, "; the last 2 steps of the run are in no checkpoint"), (6, "")):
        save = ModelCheckpoint(tmp_path / str(steps), "{step}", every_n_train_steps=3, save_top_k=-1, save_last=True)
        trainer = quiet_trainer(tmp_path, callbacks=[save], max_steps=steps, enable_checkpointing=True)
        trainer.fit(BoringModel(), loader)
        (line,) = [line for line in ending(trainer) if line.startswith("Last checkpoint")]
        assert f"(step {steps // 3 * 3}{lost})" in line
