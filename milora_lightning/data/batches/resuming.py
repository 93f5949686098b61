"""The position of a run in its training data, and how an interrupted run continues from it.

Lightning counts batches, and assumes that a resumed epoch has as many batches as any other. This module counts
examples, so that an epoch continues in its order even on another number of ranks or with another batch size. It
reconciles the two counts. Which examples have been trained on follows from Lightning's count, not from the batches that
a loader returned (workers fetch ahead, and a step may fail). If the batch size changes, Lightning's count is shifted so
that the remaining batches fill the rest of its epoch. Batches whose gradients were accumulated, but not yet followed by
a step, are trained on again, because checkpoints hold no gradients.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Protocol

import numpy as np
from lightning.pytorch import Trainer
from torch.utils.data import SequentialSampler

from milora_lightning.data.batches.sampling import Indices, LengthGroupedSampler, Position
from milora_lightning.utils.compat.lightning import checkpoint_being_loaded
from milora_lightning.utils.messages import warn

UNDONE = "undone"
"""Entry of the state with the number of batches accumulated since the last step."""


class AccumulatedFrom(int):
    """A number of batches to accumulate, in an epoch whose steps are counted from one of its batches.

    Lightning makes a step if the number of batches so far is divisible by this number.

    >>> [batch for batch in range(5, 12) if batch % AccumulatedFrom(3, 4) == 0]
    [7, 10]
    """

    def __new__(cls, batches: int, start: int) -> AccumulatedFrom:
        """Count from the batch with index ``start``."""
        number = super().__new__(cls, batches)
        number._start = start
        return number

    _start: int

    def __rmod__(self, count: int) -> int:
        """Return the number of batches since the last step."""
        return (count - self._start) % int(self)


def epoch_loop(trainer: Any) -> Any:
    """Return the loop over the batches of an epoch; None if there is no Trainer, or it has none."""
    return getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)


def batches_since_step(trainer: Any) -> int:
    """Return the number of batches accumulated by a Trainer in ``fit`` since its last step; 0 without a Trainer."""
    if (loop := epoch_loop(trainer)) is None:
        return 0
    count = loop.batch_progress
    ended = count.is_last_batch or count.current.processed >= trainer.num_training_batches
    return 0 if ended else int(count.current.processed % trainer.accumulate_grad_batches)


class HasTrainer(Protocol):
    """An object with a Trainer, such as a data module."""

    trainer: Trainer | None


class Resumption:
    """Keeps the position in the training data over the epochs of a run, and from one run to the next.

    Args:
        owner: The data module, whose Trainer counts the batches.
    """

    def __init__(self, owner: HasTrainer) -> None:
        self._owner = owner
        self.forget()

    def forget(self) -> None:
        """Start a run that is not resumed, unless a state is loaded afterwards."""
        self._saved: dict[str, Any] | None = None
        self._continues = False  # whether Lightning continues in the middle of its current epoch
        self._shift = 0  # from Lightning's epoch number to that of the order; some restarts increment Lightning's
        self._begun: tuple[ResumableSampler, int, Position, int] | None = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the position; None before any training."""
        loop = self._loop()
        if self._begun is None or loop is None:
            return self._saved
        sampler, _, start, before = self._begun
        # Batches processed, not those fetched or started: workers fetch ahead, and a step may fail.
        processed = loop.batch_progress.current.processed
        undone = min(processed - before, batches_since_step(loop.trainer))
        processed -= undone
        consumed = start.consumed + (processed - before) * sampler.global_batch
        left = max(0, loop.trainer.num_training_batches - processed) * sampler.global_batch
        end = start.end
        if end is None and consumed + left < len(sampler.lengths):
            end = consumed + int(left)
        position = replace(start, consumed=consumed, end=end)
        size, digest = len(sampler.lengths), _digest(sampler.lengths)
        run = {"run_batch": sampler.global_batch, UNDONE: undone}
        return {**asdict(position), **run, "size": size, "lengths": digest}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let the next epoch begin or continue at a saved position."""
        self.forget()
        self._saved = state and dict(state)
        trainer, saved = self._owner.trainer, self._saved or {"consumed": 0}
        if trainer is not None and saved["consumed"] > 0 and position(saved).remaining(saved.get("size", 0)) > 0:
            # Before the loops are restored, because they might find that training is complete.
            _uncount_epoch(checkpoint_being_loaded(trainer))

    def on_epoch(self, sampler: ResumableSampler) -> None:
        """Reconcile Lightning's count of batches with the position, before Lightning continues with an epoch."""
        loop = self._loop()
        self._continues = False
        self.count_from_start()
        if loop is None or not loop.restarting or self._begun is not None:
            return
        count, batches = loop.batch_progress, loop.trainer.num_training_batches
        if self._saved is None:  # a checkpoint that counts only batches
            left = 0 if count.is_last_batch else (batches - count.current.processed) * sampler.global_batch
            self._continues = count.current.processed > 0 and left > 0
        else:
            left = position(self._saved).remaining(len(sampler.lengths))
            self._continues = self._saved["consumed"] > 0 and left > 0
            moved = -self._saved.get(UNDONE, 0)
            if self._saved["run_batch"] != sampler.global_batch:
                moved = batches - math.ceil(left / sampler.global_batch) - count.current.processed
            for name in ("ready", "started", "processed", "completed"):
                setattr(count.current, name, getattr(count.current, name) + moved)
            self._saved |= {"run_batch": sampler.global_batch, UNDONE: 0}
            accumulated = loop.trainer.accumulate_grad_batches
            if self._continues and count.current.processed % accumulated:
                loop.trainer.accumulate_grad_batches = AccumulatedFrom(accumulated, count.current.processed)
        if left <= 0:
            _begin_next_epoch(loop.trainer.fit_loop)

    def begin(self, sampler: ResumableSampler) -> Position:
        """Return where an iteration begins; called when its first batch is requested."""
        start = replace(LengthGroupedSampler.start(sampler), epoch=sampler.epoch + self._shift)
        loop = self._loop()
        if loop is None:
            return start
        if self._begun is not None and self._begun[:2] == (sampler, sampler.epoch):
            return self._begun[2]
        before = loop.batch_progress.current.ready
        if self._begun is None and self._saved is not None:
            saved = position(self._saved)
            if self._continues:
                _warn_of_other_data(self._saved["lengths"], sampler.lengths, saved.epoch)
                start = saved
            else:  # the saved epoch has ended, or Lightning does not continue it
                start = replace(start, epoch=saved.epoch + (saved.consumed > 0))
            self._shift = start.epoch - sampler.epoch
        elif self._continues:
            start = replace(start, consumed=before * sampler.global_batch)
        self._begun = sampler, sampler.epoch, start, before
        return start

    def count_from_start(self) -> None:
        """Make the Trainer count the batches of a step from the start of an epoch again."""
        trainer = self._owner.trainer
        if isinstance(getattr(trainer, "accumulate_grad_batches", None), AccumulatedFrom):
            trainer.accumulate_grad_batches = int(trainer.accumulate_grad_batches)  # type: ignore[union-attr]

    def _loop(self) -> Any:
        """Return the loop over the batches of an epoch, if there is a Trainer."""
        return epoch_loop(self._owner.trainer)


class ResumableSampler(LengthGroupedSampler):
    """A :class:`LengthGroupedSampler` whose first epoch may be one that another run began.

    Args:
        resumption: Keeps the position to start from.
        arguments: Arguments of :class:`LengthGroupedSampler`.
    """

    def __init__(self, resumption: Resumption, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.resumption = resumption

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as Lightning does before each."""
        super().set_epoch(epoch)
        self.resumption.on_epoch(self)

    def start(self) -> Position:
        """Return where the next iteration begins."""
        return self.resumption.begin(self)


class OverfittingSampler(ResumableSampler, SequentialSampler):
    """The given order in each epoch: with ``overfit_batches``, Lightning takes the first batches of it.

    Lightning does not replace it, because it is also a ``SequentialSampler``.
    """

    def order(self, start: Position) -> Indices:
        """Return the given order."""
        return np.arange(len(self.lengths))


def _begin_next_epoch(fit_loop: Any) -> None:
    """Make Lightning begin a new epoch instead of continuing one that has ended.

    With ``max_steps`` set, it would otherwise count a further epoch with at most one batch of training.
    """
    epochs = fit_loop.epoch_progress.current
    if epochs.processed == epochs.started:  # otherwise the hooks at the end of the epoch have not run yet
        epochs.completed = epochs.processed
        fit_loop.epoch_loop.restarting = False
        fit_loop.reset_restart_stage()


def _uncount_epoch(checkpoint: dict[str, Any]) -> None:
    """Make Lightning continue the last epoch of a checkpoint, which ``max_steps`` cut short but Lightning counted."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress")
    if progress and 0 < progress["current"]["processed"] == progress["current"]["started"]:
        for counts in progress.values():
            counts["processed"] -= 1
            counts["completed"] = counts["processed"]


def position(state: dict[str, Any]) -> Position:
    """Return the position in a saved state, which may be an older one with fewer fields."""
    return Position(**{field.name: state[field.name] for field in fields(Position) if field.name in state})


def _digest(lengths: Sequence[int] | Indices) -> str:
    """Hash the number and lengths of the examples, on which the order depends."""
    return hashlib.sha256(np.asarray(lengths, dtype=np.int64).tobytes()).hexdigest()[:16]


def _warn_of_other_data(saved: str, lengths: Indices, epoch: int) -> None:
    if saved != _digest(lengths):
        warn(
            "The training data have other examples, other lengths in tokens or another max_tokens_per_batch than those "
            f"of the checkpoint: epoch {epoch} continues in another order, so some examples come twice in it and some "
            "not at all."
        )
