"""Saves the configuration of a run to a file and to its loggers."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger

from milora_lightning.cli.config_files import SaveConfig


class RunConfig(SaveConfig):
    """Saves ``config.yaml`` in the folder of a run, and logs its options as hyperparameters."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the options of training, each under its full name, such as ``adapter.r``."""
        if stage == "fit":
            options = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            for logger in trainer.loggers:
                logger.log_hyperparams(dict(flat(options)))
                if isinstance(logger, MLFlowLogger):  # MLflow truncates hyperparameters after 250 characters
                    experiment: Any = logger.experiment
                    experiment.log_text(logger.run_id, yaml.safe_dump(options), self.config_filename)


def flat(options: Any, name: str = "") -> list[tuple[str, Any]]:
    """Flatten nested options to pairs of path and value; lists are not flattened.

    Mappings with keys that a user has chosen, such as patterns of layer names, are written as JSON, because loggers
    allow few characters in names.

    >>> flat({"adapter": {"r": 8, "init": None}, "seed_everything": 0, "data": {}, "rank_pattern": {"q_(a|b)": 2}})
    [('adapter.r', 8), ('adapter.init', None), ('seed_everything', 0), ('rank_pattern', '{"q_(a|b)": 2}')]
    """
    if not isinstance(options, dict):
        return [(name, options)]
    if name and not all(_NAME.fullmatch(str(key)) for key in options):
        return [(name, json.dumps(options, ensure_ascii=False))]
    return [pair for key, value in options.items() for pair in flat(value, f"{name}.{key}" if name else str(key))]


_NAME = re.compile(r"\w+", re.ASCII)
