"""Defaults of the command line's Trainer: three epochs, as in the paper, and the last checkpoint is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, Timer

from milora_lightning.callbacks.interruption import SaveOnInterrupt
from milora_lightning.callbacks.progress import RunProgress
from milora_lightning.utils.compat.lightning import numbers_versions
from milora_lightning.utils.errors import InvalidInputError

EPOCHS = 3
LOG_EVERY_N_STEPS = 10


def missing_options(given: Mapping[str, Any], trains: bool) -> tuple[dict[str, Any], list[str]]:
    """Return defaults for options of the Trainer that were not given.

    Args:
        given: The Trainer's options, with callbacks instantiated.
        trains: Whether the Trainer will train; if not, the options are only needed to find checkpoints.

    Returns:
        The options, and lines that say what was chosen and how to change it.

    Raises:
        InvalidInputError: If ``default_root_dir`` is on another machine.

    >>> options, lines = missing_options({"max_steps": 100, "enable_checkpointing": False}, trains=True)
    >>> options, lines
    ({}, [])
    """
    if "://" in (root := str(given.get("default_root_dir") or "")):
        raise InvalidInputError(
            f"trainer.default_root_dir={root} is no local folder, and checkpoints are read from local files here. Give "
            "a folder of this machine, or one that is mounted, and copy it when the run is over."
        )
    given = {"max_steps": -1, **given}
    callbacks = given.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    options: dict[str, Any] = {}
    lines = []
    # Without any of these, Lightning would train 1,000 epochs.
    limited = given["max_steps"] != -1 or given.get("max_time") or any(isinstance(c, Timer) for c in callbacks)
    if given.get("max_epochs") is None and not limited:
        options["max_epochs"] = EPOCHS
        lines.append(f"Training {EPOCHS} epochs: set trainer.max_epochs, max_steps or max_time to change that.")
    if given.get("barebones") and given.get("log_every_n_steps") == LOG_EVERY_N_STEPS:
        options["log_every_n_steps"] = None  # barebones accepts no other value
    saves = given.get("enable_checkpointing") is not False and not (given.get("fast_dev_run") or given.get("barebones"))
    if saves and not any(isinstance(callback, Checkpoint) for callback in callbacks):
        # A fixed folder, where --ckpt_path last finds it; checkpoints of other runs in it are not replaced.
        folder = Path(given.get("default_root_dir") or ".") / "checkpoints"
        options["callbacks"] = [*callbacks, ModelCheckpoint(str(folder), filename="last")]
        lines.append(f"Keeping the last checkpoint in {folder}: set trainer.callbacks to change that.")
    return options, lines if trains and not given.get("fast_dev_run") else []


def with_screen(given: Mapping[str, Any], go_on: str, trains: bool) -> list[Callback]:
    """Return the callbacks, adding those for the display and for Ctrl-C unless there are others of the kind.

    Args:
        given: The Trainer's options.
        go_on: The command that resumes the run.
        trains: Whether Ctrl-C saves a checkpoint.
    """
    callbacks = given.get("callbacks") or []
    callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
    shows = given.get("enable_progress_bar") is not False
    if shows and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(RunProgress())
    saves = given.get("enable_checkpointing") is not False and not given.get("fast_dev_run")
    if trains and saves and not any(isinstance(callback, SaveOnInterrupt) for callback in callbacks):
        callbacks.append(SaveOnInterrupt(go_on))
    return callbacks


def earlier_checkpoints(trainer: Trainer, ckpt_path: str | None) -> list[str]:
    """Describe folders with checkpoints of an earlier run, and what happens to them, unless this run resumes from one.

    Args:
        trainer: The Trainer whose callbacks know where checkpoints go, and whether they replace others.
        ckpt_path: The checkpoint that this run resumes from, if any.
    """
    if ckpt_path is not None:
        return []
    lines = {}
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        folder = callback.dirpath or (None if trainer.loggers else Path(trainer.default_root_dir) / "checkpoints")
        if folder is None or not any(Path(folder).glob("*.ckpt")):  # a logger creates a separate folder for each run
            continue
        lines[str(folder)] = f"{folder} holds checkpoints of an earlier run, " + (
            "which are kept: checkpoints of this run get other names if necessary, and --ckpt_path last is the newest."
            if numbers_versions(callback)
            else "which this run replaces where the names are the same."
        )
    return list(lines.values())
