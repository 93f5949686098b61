"""The configuration of a run, in a file and in its loggers."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger

from milora_lightning.cli.config_files import SaveConfig


class RunConfig(SaveConfig):
    """Saves ``config.yaml`` in the folder of a run, and logs what it says as hyperparameters."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the options, each under its full name, such as ``adapter.r``; only of training."""
        if stage == "fit":
            options = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            for logger in trainer.loggers:
                logger.log_hyperparams(dict(flat(options)))
                if isinstance(logger, MLFlowLogger):  # whose hyperparameters end after 250 characters
                    experiment: Any = logger.experiment
                    experiment.log_text(logger.run_id, yaml.safe_dump(options), self.config_filename)


def flat(options: Any, name: str = "") -> list[tuple[str, Any]]:
    """Name each of nested options by its path; lists stay as they are.

    So do, in JSON, mappings whose keys are a user's own, such as patterns of layers: trackers take few characters in
    names.

    >>> flat({"adapter": {"r": 8, "init": None}, "seed_everything": 0, "data": {}, "rank_pattern": {"q_(a|b)": 2}})
    [('adapter.r', 8), ('adapter.init', None), ('seed_everything', 0), ('rank_pattern', '{"q_(a|b)": 2}')]
    """
    if not isinstance(options, dict):
        return [(name, options)]
    if name and not all(_NAME.fullmatch(str(key)) for key in options):
        return [(name, json.dumps(options, ensure_ascii=False))]
    return [pair for key, value in options.items() for pair in flat(value, f"{name}.{key}" if name else str(key))]


_NAME = re.compile(r"\w+", re.ASCII)
