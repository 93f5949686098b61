"""Saving a checkpoint when training is interrupted with Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from milora_lightning.utils.compat.lightning import expect_processes_to_end, numbers_versions
from milora_lightning.utils.messages import inform

SHOW_CURSOR = b"\x1b[?25h\n"


class SaveOnInterrupt(Callback):
    """Saves a checkpoint when training is interrupted with Ctrl-C, and says where it is and how to resume.

    The current step is finished first, so that the resumed run does what an uninterrupted one would have done. An
    evaluation is aborted. A second Ctrl-C ends the program at once, without saving.

    The checkpoint is the ``last`` one of the Trainer's first ModelCheckpoint, where ``ckpt_path="last"`` finds it, or,
    without a ModelCheckpoint, ``interrupted.ckpt`` in ``default_root_dir`` (or
    ``interrupted-v1.ckpt``, if there is one). Several processes check together, every
    ``log_every_n_steps`` steps, whether one of them has received Ctrl-C, and save then.

    Attributes:
        go_on: How to resume, for the message, with ``{path}`` in place of the checkpoint's path.
        interrupted: Whether there was a Ctrl-C.
    """

    def __init__(self, go_on: str = "trainer.fit(..., ckpt_path='{path}')") -> None:
        self.go_on = go_on
        self.interrupted = False
        self._before: Any = None  # the handler of Ctrl-C that a run has replaced
        self._ended: Any = None  # that of the last run that has ended
        self._in_step = False
        self._step = 0  # the global step before the current one
        self._trainer: Trainer | None = None
        self._saved: tuple[int, str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Handle Ctrl-C during training."""
        self._saved = None
        if stage == "fit" and self._before is None and threading.current_thread() is threading.main_thread():
            self._trainer = trainer
            self.interrupted = self._in_step = False
            self._before = signal.signal(signal.SIGINT, self._on_signal)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous handler of Ctrl-C."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._ended, self._before, self._trainer = self._before, None, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that a step has begun; it may take several batches whose gradients are accumulated."""
        if not self._in_step:
            self._in_step, self._step = True, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after Ctrl-C, now that the step is complete and a run can be resumed exactly."""
        if trainer.global_step == self._step and trainer.accumulate_grad_batches > 1:
            return
        self._in_step = False
        interrupted = self.interrupted
        if trainer.world_size > 1:  # not at every step, because it synchronizes all ranks and their devices
            every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
            due = trainer.global_step % every == 0
            interrupted = due and trainer.strategy.reduce_boolean_decision(interrupted, all=False)
        if interrupted:
            self.interrupted = True
            self._save(trainer)
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say which checkpoint the run can be resumed from; after another error, leave Ctrl-C to what comes."""
        if not isinstance(exception, KeyboardInterrupt):
            self.teardown(trainer, pl_module, "fit")
            return
        expect_processes_to_end()
        self.interrupted = True  # a second Ctrl-C ends at once, with the cursor shown again
        signal.signal(signal.SIGINT, signal.SIG_DFL if self._before is None else self._on_signal)
        trained = trainer.global_step > 0
        if trained and self._saved is None and trainer.world_size == 1 and not self._in_step:
            self._save(trainer)  # between two steps: in an evaluation
        if not trained:
            inform("Interrupted before the first step: there is nothing to save.")
        elif self._saved is None:
            inform(f"Interrupted at step {trainer.global_step}, which is not saved.")
        else:
            step, path = self._saved
            go_on = self.go_on.replace("{path}", path)
            inform(f"Interrupted at step {step}. Saved in {path}; resume with: {go_on}")
        self.teardown(trainer, pl_module, "fit")

    def _save(self, trainer: Trainer) -> None:
        path = _path(trainer)
        trainer.save_checkpoint(path)
        self._saved = trainer.global_step, os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._before is None:  # after an error, Lightning gives a run's handlers back to what comes later
            signal.signal(signal.SIGINT, self._ended)
            os.kill(os.getpid(), signal.SIGINT)
            return
        if self.interrupted:
            if sys.stdout.isatty():
                os.write(1, SHOW_CURSOR)  # live displays hide it; written directly, because they may hold locks now
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
            return
        self.interrupted = True
        several = self._trainer is not None and self._trainer.world_size > 1
        if not self._in_step and not several:
            raise KeyboardInterrupt
        inform("Ctrl-C: finishing this step, then saving. Press it again to end at once, without saving.")


def _path(trainer: Trainer) -> str:
    """Return an unused path for an interrupted run's checkpoint, where ``ckpt_path="last"`` finds it.

    The ModelCheckpoint that writes ``last`` is updated, so that it replaces this file when the run is resumed.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            attribute = "best_model_path" if _calls_its_only_one_last(callback) else "last_model_path"
            path = callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST)
            version = callback.STARTING_VERSION
            # The callback itself chooses an unused name in this way.
            while numbers_versions(callback) and path != getattr(callback, attribute):
                if not callback.file_exists(path, trainer):
                    break
                path = callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST, ver=version)
                version += 1
            setattr(callback, attribute, path)
            return path
    folder = Path(trainer.default_root_dir)
    names = ("interrupted.ckpt", *(f"interrupted-v{number}.ckpt" for number in range(1, 10_000)))
    free = next(name for name in names if not (folder / name).exists())
    return str(trainer.strategy.broadcast(str(folder / free)))


def _calls_its_only_one_last(callback: ModelCheckpoint) -> bool:
    return callback.filename == callback.CHECKPOINT_NAME_LAST and not callback.save_last
