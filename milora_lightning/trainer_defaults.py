"""What the command line's Trainer does where it is not told: three epochs, as in the paper, and the last is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, Timer

EPOCHS = 3
LOG_EVERY_N_STEPS = 10


def missing_options(given: Mapping[str, Any], trains: bool) -> tuple[dict[str, Any], list[str]]:
    """Return options of the Trainer in place of those that were not given.

    Args:
        given: The Trainer's options, callbacks instantiated.
        trains: Whether it is to train, or only where a run left its checkpoint is to be known.

    Returns:
        The options, and lines that say what was chosen and how to choose otherwise.

    >>> options, lines = missing_options({"max_steps": 100, "enable_checkpointing": False}, trains=True)
    >>> options, lines
    ({}, [])
    """
    given = {"max_steps": -1, **given}
    callbacks = given.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    options: dict[str, Any] = {}
    lines = []
    # Lightning's own answer is 1,000 epochs, but for one of these.
    limited = given["max_steps"] != -1 or given.get("max_time") or any(isinstance(c, Timer) for c in callbacks)
    if given.get("max_epochs") is None and not limited:
        options["max_epochs"] = EPOCHS
        lines.append(f"Training {EPOCHS} epochs: set trainer.max_epochs, max_steps or max_time for another length.")
    saves = given.get("enable_checkpointing") is not False and not given.get("fast_dev_run")
    if saves and not any(isinstance(callback, Checkpoint) for callback in callbacks):
        # A folder that stays the same, where --ckpt_path last looks; what other runs have left there is not replaced.
        folder = Path(given.get("default_root_dir") or ".") / "checkpoints"
        options["callbacks"] = [*callbacks, ModelCheckpoint(str(folder), filename="last")]
        lines.append(f"Keeping the last checkpoint in {folder}: set trainer.callbacks for another place or choice.")
    return options, lines if trains and not given.get("fast_dev_run") else []
