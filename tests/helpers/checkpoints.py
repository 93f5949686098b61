"""What the tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from helpers.models import quiet_trainer
from milora_lightning import (
    MiLoRAInit,
)


def train(folder: Path, lm: LightningModule, datamodule: Any = None, **adapter: Any) -> Path:
    """Train a few steps and return the checkpoint."""
    trainer = quiet_trainer(folder, max_steps=3, callbacks=[MiLoRAInit(**{"r": 4, **adapter})])
    trainer.fit(lm, datamodule)
    trainer.save_checkpoint(folder / "trained.ckpt")
    return folder / "trained.ckpt"
