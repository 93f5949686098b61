"""An interrupted run goes on bit for bit as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from helpers.forked import run_forked
from helpers.models import quiet_trainer, save_tiny_model, write_examples
from helpers.modules import data, module
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from milora_lightning import MiLoRAInit, RandomState
from milora_lightning.checkpoint.adapter import KEY
from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.cli.main import main


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


def run(
    folder: Path, model: Path, name: str, max_steps: int, ckpt_path: Path | None = None, noise: int = 0, **options: Any
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
        **options,
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


# 6 of the 10 batches are 3 optimizer steps an epoch.
@pytest.mark.parametrize("interrupted_at", [3, 4])
def test_epoch_shorter_than_its_data_goes_on_where_it_was(interrupted_at: int, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    losses, whole = run(tmp_path, model, "whole", 7, limit_train_batches=6)
    path = tmp_path / "whole" / f"step={interrupted_at}.ckpt"
    later, resumed = run(tmp_path, model, "resumed", 7, path, noise=99, limit_train_batches=6)
    assert losses[2 * interrupted_at :] == later
    assert all(k == KEY or torch.equal(v, resumed["state_dict"][k]) for k, v in whole["state_dict"].items())


def test_without_the_random_state_it_would_not(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    losses, _ = run(tmp_path, model, "whole", 4)
    path = tmp_path / "whole" / "step=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["random_state"]
    torch.save(checkpoint, path)
    later, _ = run(tmp_path, model, "resumed", 4, path, noise=99)
    assert losses[4:] != later


def dying(way: str) -> None:
    """Have this process kill itself with half of its ninth checkpoint written, or be told to end at step 7."""
    writes = 0

    def write_half(self: LocalFileOpener, content: bytes) -> Any:
        nonlocal writes
        writes += 1
        if writes == 9:
            shutil.copy("saved/last.ckpt", "before.ckpt")
            self.f.write(content[: len(content) // 2])
            self.f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.f.write(content)

    def terminate(self: MiLoRAInit, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    if way == "SIGKILL":
        LocalFileOpener.write = write_half
    elif way == "SIGTERM":
        MiLoRAInit.on_train_batch_end = terminate  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM"])
def test_killed_in_the_middle_it_goes_on_as_if_nothing_had_happened(way: str, tmp_path: Path) -> None:
    """SIGKILL strikes with half of a checkpoint written: the one before stays whole, and the run goes on from it."""
    save_tiny_model(tmp_path / "model", "llama")
    write_examples(tmp_path / "train.jsonl", 40)

    def fit(way: str, folder: str, *more: str) -> int:
        options = {
            "model.name_or_path": "model",
            "adapter.r": 8,
            "adapter.lora_dropout": 0.3,
            "data.source": "milora_lightning.data.Files",
            "data.source.train": "train.jsonl",
            "data.source.validation_size": 0,
            "data.batch_size": 2,
            "trainer.max_steps": 15,
            "trainer.accumulate_grad_batches": 2,
            "trainer.accelerator": "cpu",
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.callbacks": "ModelCheckpoint",
            "trainer.callbacks.dirpath": folder,
            "trainer.callbacks.every_n_train_steps": 1,
            "trainer.callbacks.save_last": "true",
            "trainer.callbacks.enable_version_counter": "false",
        }
        arguments = ["fit", *(f"--{key}={value}" for key, value in options.items()), *more]

        def train() -> None:
            torch.manual_seed(len(more))  # a run that goes on has another random state than the one that began
            dying(way)
            main(arguments)

        return run_forked(train, tmp_path)

    assert fit("", "whole") == 0
    assert (fit(way, "saved") == 0) == (way == "SIGTERM")  # at which Lightning stops in good order
    last = tmp_path / "saved" / "last.ckpt"
    stopped_at = read_checkpoint(last)["global_step"]
    assert 0 < stopped_at < 15
    if way == "SIGKILL":
        assert last.read_bytes() == (tmp_path / "before.ckpt").read_bytes()
    assert fit("", "saved", "--ckpt_path=last") == 0
    whole, resumed = read_checkpoint(tmp_path / "whole" / "last.ckpt"), read_checkpoint(last)
    assert whole["global_step"] == resumed["global_step"] == 15
    assert all(k == KEY or torch.equal(v, resumed["state_dict"][k]) for k, v in whole["state_dict"].items())
