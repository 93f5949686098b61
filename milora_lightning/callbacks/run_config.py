"""The configuration of a run, in a file and in its loggers."""

from __future__ import annotations

from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer

from milora_lightning.config_files import SaveConfig


class RunConfig(SaveConfig):
    """Saves ``config.yaml`` in the folder of a run, and logs what it says as hyperparameters."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the options, each under its full name, such as ``adapter.r``; only of training."""
        if stage == "fit":
            options = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            for logger in trainer.loggers:
                logger.log_hyperparams(dict(flat(options)))


def flat(options: Any, name: str = "") -> list[tuple[str, Any]]:
    """Name each of nested options by its path; lists stay as they are.

    >>> flat({"adapter": {"r": 8, "init": None}, "seed_everything": 0, "data": {}})
    [('adapter.r', 8), ('adapter.init', None), ('seed_everything', 0)]
    """
    if not isinstance(options, dict):
        return [(name, options)]
    return [pair for key, value in options.items() for pair in flat(value, f"{name}.{key}" if name else str(key))]
