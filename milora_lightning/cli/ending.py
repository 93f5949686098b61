"""The last lines of ``fit``: why training stopped, where its checkpoints are, and how to use them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers import PretrainedConfig

from milora_lightning.models.files import takes_images
from milora_lightning.screen.figures import number
from milora_lightning.utils.compat.lightning import step_of_last_save
from milora_lightning.utils.counting import counted


def program() -> str:
    """Return the command that calls this program again."""
    path = Path(sys.argv[0])
    return f"python {shlex.quote(str(path))}" if path.suffix == ".py" else path.name


def resumption(args: Sequence[str]) -> str:
    """Return the command that resumes the run with these arguments from its last checkpoint.

    >>> resumption(["fit", "--config", "mine.yaml", "--ckpt_path=x.ckpt"]).removeprefix(program())
    ' fit --config mine.yaml --ckpt_path last'
    """
    kept: list[str] = []
    for before, arg in zip(["", *args], args, strict=False):
        if not arg.startswith("--ckpt_path") and before != "--ckpt_path":
            kept.append(arg)
    return f"{program()} {shlex.join(kept)} --ckpt_path last"


def by_ctrl_c(trainer: Trainer, error: SystemExit) -> bool:
    """Return whether Lightning has ended a run because of Ctrl-C; SIGTERM is a regular end."""
    return trainer.interrupted and not isinstance(error, SIGTERMException)


def why_stopped(trainer: Trainer) -> list[str]:
    """Return why training ended early, one line for each callback that stopped it."""
    lines = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and trainer.should_stop and callback.stopping_reason_message:
            reason = callback.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
            when = f"step {trainer.global_step}, in epoch {callback.stopped_epoch + 1}"
            lines.append(f"Stopped early at {when}: {reason}")
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            lines.append(f"Stopped at step {trainer.global_step}: max_time is over.")
    return lines


def checkpoints(trainer: Trainer) -> tuple[str | None, list[str]]:
    """Return the checkpoint to use, and lines that say where the checkpoints are.

    The checkpoint to use is the best one if a metric is monitored, and the last one otherwise.
    """
    best = ""
    lines = []
    saved: list[tuple[int, str]] = []
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.monitor and callback.best_model_path and callback.best_model_score is not None:
            best = _short(callback.best_model_path)
            score = number(float(callback.best_model_score))
            lines.append(f"Best checkpoint ({callback.monitor} {score}): {best}")
        if path := callback.last_model_path or ("" if callback.monitor else callback.best_model_path):
            saved.insert(0, (step_of_last_save(callback), path))
    step, last = max(saved, key=lambda each: each[0], default=(0, ""))
    if last:
        behind = trainer.global_step - step
        lost = f"; the last {counted(behind, 'step')} of the run are in no checkpoint" if behind > 0 else ""
        lines.insert(0, f"Last checkpoint{f' (step {step}{lost})' if step else ''}: {_short(last)}")
    return best or (_short(last) if last else None), lines


def ending(trainer: Trainer) -> list[str]:
    """Return the last lines of ``fit``."""
    path, lines = checkpoints(trainer)
    lines = [*why_stopped(trainer), *lines]
    if path is None:
        return [
            *lines,
            "No checkpoint was saved: add a ModelCheckpoint to trainer.callbacks to keep the trained weights.",
        ]
    return [*lines, *what_next(trainer, shlex.quote(path))]


def what_next(trainer: Trainer, path: str) -> list[str]:
    """Return the command that uses a checkpoint; ``chat`` shows no images."""
    config = getattr(getattr(trainer.lightning_module, "model", None), "config", None)
    if isinstance(config, PretrainedConfig) and takes_images(config):
        return [f"Export it: {program()} export --ckpt_path {path} --output exported --format merged"]
    return [f"Talk to it: {program()} chat --ckpt_path {path}"]


def _short(path: str) -> str:
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
