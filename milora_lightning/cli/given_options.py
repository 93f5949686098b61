"""Optimizer options given together with a checkpoint whose optimizer state also has options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from milora_lightning.training.resuming import options
from milora_lightning.training.schedules import set_rate
from milora_lightning.utils.messages import inform


class GivenOptimizerOptions(Callback):
    """Makes a resumed run use the given optimizer options, and says where they differ from the checkpoint.

    Restoring the optimizer's state would override them with the options in the checkpoint.

    Args:
        given: The given options by name, such as ``lr``; all others come from the checkpoint.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the options after the optimizer's state has been restored."""
        if trainer.ckpt_path is None:
            return
        for index, optimizer in enumerate(trainer.optimizers):
            saved = options(optimizer)[0]
            for name, value in self.given.items():
                was = tuple(saved[name]) if isinstance(saved.get(name), list) else saved.get(name)
                if name not in saved or was == value:
                    continue
                inform(f"model.optimizer.{name}: {value} here, {was} in the checkpoint")
                if name == "lr":
                    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
                    set_rate(optimizer, schedules[index] if index < len(schedules) else None, value)
                else:
                    for group in optimizer.param_groups:
                        group[name] = value
