"""Loggers by a single word: ``--logger wandb``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from milora_lightning.utils.compat.lightning import options_of_wandb
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError, MissingPackageError

LoggerName = Literal["tensorboard", "wandb", "mlflow", "csv", "none"]

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
"""The packages for each logger that needs one; any of them is enough."""


def make_logger(name: LoggerName, given: Any, folder: str | None) -> Logger | Literal[False]:
    """Create a logger by name that logs to the same place as the config's logger would.

    Args:
        name: Name of the logger.
        given: The Trainer's ``logger``: a logger, a list of loggers, or a bool.
        folder: The Trainer's ``default_root_dir``.

    Raises:
        ModuleNotFoundError: If the package of the logger is not installed.
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
        return _wandb(os.environ.get("WANDB_PROJECT") or run, save_dir)
    if name == "mlflow":
        return _mlflow(os.environ.get("MLFLOW_EXPERIMENT_NAME") or run, save_dir)
    return CSVLogger(save_dir, run)


def start(logger: Logger) -> None:
    """Start the run of a logger that talks to a server, before the live display, because it may ask for a key.

    Raises:
        InvalidInputError: If the logger cannot start; the message says what to do.
    """
    if not isinstance(logger, (WandbLogger, MLFlowLogger)):
        return
    try:
        _ = logger.experiment
    except (KeyboardInterrupt, ModuleNotFoundError):
        raise
    except Exception as error:  # raised by either package
        kind, remedy = (
            ("W&B", "run wandb login, or set WANDB_MODE=offline")
            if isinstance(logger, WandbLogger)
            else ("MLflow", "check MLFLOW_TRACKING_URI, or unset it to log to a file")
        )
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise InvalidInputError(
            f"{kind} cannot log the run: {reason}. To continue, {remedy}; or use --logger csv."
        ) from error


@contextmanager
def no_logs_of_refused_runs(trainer: Trainer) -> Iterator[None]:
    """Remove the folders that loggers have created for a run that is refused before its first step.

    Lightning creates them before the model is built. They contain at most the configuration, and the next run would
    needlessly be ``version_1``.
    """
    kinds = (CSVLogger, TensorBoardLogger)
    folders = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, kinds)]
    new = [folder for folder in folders if not folder.exists()] if trainer.is_global_zero else []
    try:
        yield
    except (MiLoRAError, MisconfigurationException):
        for folder in new if trainer.global_step == 0 else ():
            _remove(folder)
        raise


def _remove(folder: Path) -> None:
    """Remove a folder of logs and its parent, unless they contain anything else."""
    for path in folder.glob("*"):
        if path.name in ("config.yaml", "hparams.yaml") or path.name.startswith("events.out.tfevents"):
            path.unlink()
    for empty in (folder, folder.parent):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()


def _wandb(project: str, save_dir: str) -> WandbLogger:
    Path(save_dir).mkdir(
        parents=True, exist_ok=True
    )  # W&B looks for a git repository there, and warns if the folder is missing
    logger = WandbLogger(project=project, save_dir=save_dir)
    options_of_wandb(logger).pop("anonymous", None)  # W&B warns that it has no effect
    return logger


def _mlflow(experiment: str, save_dir: str) -> MLFlowLogger:
    os.environ.setdefault(
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"
    )  # it would disturb the live display of the run
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return MLFlowLogger(experiment, tracking_uri=uri)
    folder = Path(save_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # A database, because MLflow 3.17 and later refuse a folder of files.
    artifacts = (folder / "mlartifacts").as_uri()
    return MLFlowLogger(
        experiment, tracking_uri=f"sqlite:///{(folder / 'mlflow.db').as_posix()}", artifact_location=artifacts
    )


def _place(given: Any) -> Mapping[str, Any]:
    first = next(iter(given), None) if isinstance(given, (list, tuple)) else given
    if not isinstance(first, Logger):
        return {}
    return {"save_dir": first.save_dir, "name": first.name}
