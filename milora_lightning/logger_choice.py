"""A logger by one word."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from milora_lightning.errors import MissingPackageError

LoggerName = Literal["tensorboard", "wandb", "mlflow", "csv", "none"]

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
"""Of each logger that needs one, the packages of which one has to be there."""


def make_logger(name: LoggerName, given: Any, folder: str | None) -> Logger | Literal[False]:
    """Make the logger of a name, where the config's own logger would have logged.

    Args:
        name: Which.
        given: The Trainer's ``logger``: a logger, a list of them, or whether there is one.
        folder: The Trainer's ``default_root_dir``.

    Raises:
        ModuleNotFoundError: If its package is not installed.
    """
    if name == "none":
        return False
    packages = PACKAGES.get(name, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise MissingPackageError(
            f"--logger {name} needs the package {packages[0]}, which is not installed: pip install {packages[0]}"
        )
    place = _place(given)
    save_dir, run = place.get("save_dir") or folder or ".", place.get("name") or "lightning_logs"
    if name == "tensorboard":
        return TensorBoardLogger(save_dir, run)
    if name == "wandb":
        return WandbLogger(project=run, save_dir=save_dir)
    if name == "mlflow":
        return MLFlowLogger(run, save_dir=f"{save_dir}/mlruns")
    return CSVLogger(save_dir, run)


def _place(given: Any) -> Mapping[str, Any]:
    first = next(iter(given), None) if isinstance(given, (list, tuple)) else given
    if not isinstance(first, Logger):
        return {}
    return {"save_dir": first.save_dir, "name": first.name}
