"""Where in its data a training run is, and how it goes on there after it was interrupted.

Lightning counts batches, and a resumed epoch has as many as any other. The data are counted in examples, and an epoch
that was begun ends as it was begun, also on another number of ranks or with another batch size. What brings the two
together is in this module: Lightning's count is the truth about what has been trained on (not what a loader handed
out: workers fetch ahead, a step may fail), and where a batch has another size than before, that count is moved so that
what is left fills the rest of an epoch.
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
from milora_lightning.utils.compat import checkpoint_being_loaded
from milora_lightning.utils.messages import warn


class HasTrainer(Protocol):
    """A data module."""

    trainer: Trainer | None


class Resumption:
    """Keeps the place in the training data, over the epochs of a run and from one run to the next.

    Args:
        owner: The data module, whose Trainer counts the batches.
    """

    def __init__(self, owner: HasTrainer) -> None:
        self._owner = owner
        self.forget()

    def forget(self) -> None:
        """Begin a run that so far is not a resumed one."""
        self._saved: dict[str, Any] | None = None
        self._goes_on = False  # whether Lightning goes on in the middle of the epoch that it set
        self._shift = 0  # of the order's epoch against Lightning's, which some restarts count on without training
        self._begun: tuple[ResumableSampler, int, Position, int] | None = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the place; None before any training."""
        loop = self._loop()
        if self._begun is None or loop is None:
            return self._saved
        sampler, _, start, before = self._begun
        # Neither the batches handed out nor those begun: workers fetch ahead, and a step may fail.
        processed = loop.batch_progress.current.processed
        consumed = start.consumed + (processed - before) * sampler.global_batch
        left = max(0, loop.trainer.num_training_batches - processed) * sampler.global_batch
        end = start.end
        if end is None and consumed + left < len(sampler.lengths):
            end = consumed + int(left)
        position = replace(start, consumed=consumed, end=end)
        size, digest = len(sampler.lengths), _digest(sampler.lengths)
        return {**asdict(position), "run_batch": sampler.global_batch, "size": size, "lengths": digest}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Have the next epoch begin, or be gone on with, at a place."""
        self.forget()
        self._saved = state and dict(state)
        trainer, saved = self._owner.trainer, self._saved or {"consumed": 0}
        if trainer is not None and saved["consumed"] > 0 and _position(saved).remaining(saved.get("size", 0)) > 0:
            # Now, because the loops, which are restored later, may find that all is done.
            _uncount_epoch(checkpoint_being_loaded(trainer))

    def on_epoch(self, sampler: ResumableSampler) -> None:
        """Bring Lightning's count of batches together with the place, before it goes on with an epoch."""
        loop = self._loop()
        self._goes_on = False
        if loop is None or not loop.restarting or self._begun is not None:
            return
        count, batches = loop.batch_progress, loop.trainer.num_training_batches
        if self._saved is None:  # a checkpoint that counts batches alone
            left = 0 if count.is_last_batch else (batches - count.current.processed) * sampler.global_batch
            self._goes_on = count.current.processed > 0 and left > 0
        else:
            left = _position(self._saved).remaining(len(sampler.lengths))
            self._goes_on = self._saved["consumed"] > 0 and left > 0
            if self._saved["run_batch"] != sampler.global_batch:
                moved = batches - math.ceil(left / sampler.global_batch) - count.current.processed
                for name in ("ready", "started", "processed", "completed"):
                    setattr(count.current, name, getattr(count.current, name) + moved)
                self._saved["run_batch"] = sampler.global_batch
        if left <= 0:
            _begin_next_epoch(loop.trainer.fit_loop)

    def begin(self, sampler: ResumableSampler) -> Position:
        """Return where an iteration begins, when its first batch is asked for."""
        start = Position(sampler.epoch + self._shift, sampler.seed, sampler.global_batch)
        loop = self._loop()
        if loop is None:
            return start
        if self._begun is not None and self._begun[:2] == (sampler, sampler.epoch):
            return self._begun[2]
        before = loop.batch_progress.current.ready
        if self._begun is None and self._saved is not None:
            saved = _position(self._saved)
            if self._goes_on:
                _warn_of_other_data(self._saved["lengths"], sampler.lengths, saved.epoch)
                start = saved
            else:  # it ended, or Lightning does not go on with it
                start = replace(start, epoch=saved.epoch + (saved.consumed > 0))
            self._shift = start.epoch - sampler.epoch
        elif self._goes_on:
            start = replace(start, consumed=before * sampler.global_batch)
        self._begun = sampler, sampler.epoch, start, before
        return start

    def _loop(self) -> Any:
        """Return the loop over the batches of an epoch, if there is a Trainer."""
        trainer = self._owner.trainer
        return None if trainer is None else getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)


class ResumableSampler(LengthGroupedSampler):
    """A :class:`LengthGroupedSampler` whose first epoch may be one that another run began.

    Args:
        resumption: Knows where.
        arguments: Those of :class:`LengthGroupedSampler`.
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

    Being a ``SequentialSampler`` as well, it is left alone by Lightning.
    """

    def order(self, start: Position) -> Indices:
        """Return the given order."""
        return np.arange(len(self.lengths))


def _begin_next_epoch(fit_loop: Any) -> None:
    """Have Lightning begin an epoch where it believes to go on in the one that has ended.

    It does so where ``max_steps`` is set, and counts an epoch in which it trains on one batch or none.
    """
    epochs = fit_loop.epoch_progress.current
    if epochs.processed == epochs.started:  # else the hooks of the epoch's end are still to come
        epochs.completed = epochs.processed
        fit_loop.epoch_loop.restarting = False
        fit_loop.reset_restart_stage()


def _uncount_epoch(checkpoint: dict[str, Any]) -> None:
    """Have Lightning go on in the epoch that a checkpoint has as its last, though ``max_steps`` cut it short."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress")
    if progress and 0 < progress["current"]["processed"] == progress["current"]["started"]:
        for counts in progress.values():
            counts["processed"] -= 1
            counts["completed"] = counts["processed"]


def _position(state: dict[str, Any]) -> Position:
    return Position(**{field.name: state[field.name] for field in fields(Position)})


def _digest(lengths: Sequence[int] | Indices) -> str:
    """Tell data apart by what their order depends on: how many examples, and how long they are."""
    return hashlib.sha256(np.asarray(lengths, dtype=np.int64).tobytes()).hexdigest()[:16]


def _warn_of_other_data(saved: str, lengths: Indices, epoch: int) -> None:
    if saved != _digest(lengths):
        warn(
            "The training data are other examples, or of other lengths in tokens, than those of the checkpoint: epoch "
            f"{epoch} goes on in another order, so that some examples come twice in it and some not at all."
        )
