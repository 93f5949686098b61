"""An interrupted run goes on bit for bit as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quiet_trainer, save_tiny_model, write_examples
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_module import data, module

from milora_lightning import MiLoRAInit, RandomState
from milora_lightning.checkpoint import KEY, read_checkpoint


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


def run(
    folder: Path, model: Path, name: str, max_steps: int, ckpt_path: Path | None = None, noise: int = 0
) -> tuple[list[float], dict[str, Any]]:
    """Train up to a step, with dropout, accumulation and evaluations; return losses and the final checkpoint."""
    torch.manual_seed(noise if ckpt_path else 0)  # a new process has another random state
    losses = Losses()
    saved = ModelCheckpoint(folder / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(
        folder,
        max_steps=max_steps,
        max_epochs=5,
        accumulate_grad_batches=2,
        val_check_interval=4,
        num_sanity_val_steps=1,
        enable_checkpointing=True,
        callbacks=[MiLoRAInit(r=4, lora_dropout=0.3), RandomState(), losses, saved],
    )
    trainer.fit(module(model), data(folder, model), ckpt_path=ckpt_path)
    return losses.values, read_checkpoint(folder / name / f"step={max_steps}.ckpt")


# 40 examples are 10 batches an epoch and 5 optimizer steps: in the first epoch, at its end, in the second.
@pytest.mark.parametrize("interrupted_at", [2, 5, 7])
def test_resumed_run_equals_the_uninterrupted_one(interrupted_at: int, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    losses, whole = run(tmp_path, model, "whole", 9)
    path = tmp_path / "whole" / f"step={interrupted_at}.ckpt"
    later, resumed = run(tmp_path, model, "resumed", 9, path, noise=99)
    assert losses[2 * interrupted_at :] == later
    assert len(later) == 18 - 2 * interrupted_at
    for key, value in whole["state_dict"].items():
        assert key == KEY or torch.equal(resumed["state_dict"][key], value)
    for index, entry in whole["optimizer_states"][0]["state"].items():
        for key, value in entry.items():
            assert torch.equal(resumed["optimizer_states"][0]["state"][index][key], value)
    assert whole["lr_schedulers"] == resumed["lr_schedulers"]


def test_without_the_random_state_it_would_not(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    losses, _ = run(tmp_path, model, "whole", 4)
    path = tmp_path / "whole" / "step=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["random_state"]
    torch.save(checkpoint, path)
    later, _ = run(tmp_path, model, "resumed", 4, path, noise=99)
    assert losses[4:] != later


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_while_saving_the_previous_checkpoint_stays_whole(tmp_path: Path) -> None:
    """SIGKILL at many moments of a process that does little but save: what is there can always be read."""
    save_tiny_model(tmp_path / "model", "llama")
    write_examples(tmp_path / "train.jsonl", 40)
    script = tmp_path / "train.py"
    script.write_text(
        "import torch; torch.set_num_threads(1)\n"
        "from milora_lightning.cli import main\n"
        "main(['fit', '--model.name_or_path=model', '--adapter.r=8',\n"
        "      '--data.source=milora_lightning.data.Files', '--data.source.train=train.jsonl',\n"
        "      '--data.batch_size=1', '--trainer.max_epochs=1000', '--trainer.accelerator=cpu',\n"
        "      '--trainer.logger=false', '--trainer.enable_progress_bar=false',\n"
        "      '--trainer.callbacks=ModelCheckpoint', '--trainer.callbacks.dirpath=saved',\n"
        "      '--trainer.callbacks.every_n_train_steps=1', '--trainer.callbacks.save_last=true',\n"
        "      '--trainer.callbacks.enable_version_counter=false'])\n"
    )
    last = tmp_path / "saved" / "last.ckpt"
    for delay in (0.013, 0.029, 0.041):
        process = subprocess.Popen([sys.executable, script], cwd=tmp_path, stdout=-3, stderr=-3, env=dict(os.environ))
        before = last.stat().st_mtime_ns if last.exists() else 0
        deadline = time.monotonic() + 120
        while not last.exists() or last.stat().st_mtime_ns == before:
            assert process.poll() is None, "training ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert read_checkpoint(last)["global_step"] > 0
