"""The examples of an optimizer step, distributed over devices and accumulated batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from milora_lightning.utils.compat.lightning import checkpoint_being_loaded
from milora_lightning.utils.counting import counted
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn


@dataclass(frozen=True)
class StepBatch:
    """The examples of an optimizer step.

    Attributes:
        devices: Number of devices that share each batch.
        examples: Examples in a batch of one device.
        accumulated: Number of batches whose gradients are accumulated.
    """

    devices: int
    examples: int
    accumulated: int

    @property
    def batch(self) -> int:
        """The examples of a batch over all devices."""
        return self.devices * self.examples

    @property
    def total(self) -> int:
        """The examples of an optimizer step."""
        return self.batch * self.accumulated

    @property
    def in_words(self) -> str:
        """The composition of a step.

        >>> StepBatch(8, 4, 2).in_words, StepBatch(1, 16, 1).in_words
        ('64 examples a step = 8 devices x 4 examples x 2 accumulated batches', '16 examples a step')
        """
        factors = [counted(self.devices, "device")] if self.devices > 1 else []
        factors += [counted(self.examples, "example")] if self.devices > 1 or self.accumulated > 1 else []
        factors += [f"{self.accumulated:,} accumulated batches"] if self.accumulated > 1 else []
        return f"{counted(self.total, 'example')} a step" + (f" = {' x '.join(factors)}" if factors else "")


def share_out(examples: int, most: int, devices: int) -> StepBatch:
    """Distribute the examples of an optimizer step over devices, in as few batches as possible.

    Args:
        examples: Examples in a step.
        most: Maximum number of examples in a batch of one device.
        devices: Number of devices.

    Raises:
        ValueError: If the devices cannot get equally many.

    >>> share_out(64, 4, 8), share_out(12, 8, 1)
    (StepBatch(devices=8, examples=4, accumulated=2), StepBatch(devices=1, examples=6, accumulated=2))
    >>> share_out(16, 16, 6)
    Traceback (most recent call last):
    milora_lightning.utils.errors.InvalidInputError: data.global_batch_size=16 cannot be shared evenly by 6 devices: \
use 4 devices (trainer.devices), or a multiple of 6, such as 12 or 18.
    """
    if examples % devices:
        fewer = max(n for n in range(1, devices) if examples % n == 0)
        near = [n for n in (examples // devices * devices, (examples // devices + 1) * devices) if n]
        raise InvalidInputError(
            f"data.global_batch_size={examples} cannot be shared evenly by {devices} devices: use "
            f"{counted(fewer, 'device')} (trainer.devices), or a multiple of {devices}, such as "
            f"{' or '.join(map(str, near))}."
        )
    each = examples // devices
    size = max(n for n in range(1, min(most, each) + 1) if each % n == 0)
    return StepBatch(devices, size, each // size)


@dataclass
class _Record:
    """Values of a Trainer's options by name: the user's, and those that replace them."""

    asked: dict[str, Any] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)


_KEPT = "milora_step_options"
"""Attribute of a Trainer with its record."""


class StepOptions:
    """Conversion of a Trainer's options that count batches, if the number of examples in an optimizer step is given.

    The Trainer accumulates as many batches as a step has. The options ``val_check_interval`` and
    ``limit_train_batches`` then count steps instead of batches, so that they mean the same on any number of devices.
    The user's values are remembered, because a Trainer may fit several times, possibly with other data.
    """

    def restore(self, trainer: Trainer) -> None:
        """Restore the user's options of a Trainer if an earlier run has changed them."""
        for name in _record(trainer).set:
            setattr(trainer, name, self._asked_for(trainer, name))
        vars(trainer).pop(_KEPT, None)

    def accumulate(self, trainer: Trainer, step: StepBatch) -> None:
        """Make a Trainer accumulate the batches of a step.

        Raises:
            ValueError: If it cannot, or other options conflict with this.
        """
        asked = self._asked_for(trainer, "accumulate_grad_batches")
        if asked not in (1, step.accumulated):
            raise InvalidInputError(
                f"trainer.accumulate_grad_batches={asked} does not fit data.global_batch_size: {step.in_words}. Leave "
                f"accumulate_grad_batches out, or set data.global_batch_size: {step.batch * asked}."
            )
        if _is_scheduled(trainer):
            raise InvalidInputError(
                "A GradientAccumulationScheduler changes the number of examples in a step, which "
                "data.global_batch_size fixes: use one of the two."
            )
        module = getattr(trainer, "lightning_module", None)
        if step.accumulated > 1 and module is not None and not module.automatic_optimization:
            raise InvalidInputError(
                f"{step.in_words}, but {type(module).__name__} optimizes manually, so the Trainer cannot accumulate: "
                f"set data.batch_size: {step.examples * step.accumulated}, or leave data.global_batch_size out."
            )
        self._change(trainer, "accumulate_grad_batches", step.accumulated)

    def count_steps(self, trainer: Trainer, step: StepBatch, rows: int | None) -> None:
        """Convert the options that count batches.

        Args:
            trainer: The Trainer.
            step: The composition of an optimizer step.
            rows: Number of examples in an epoch; None if it is not known.
        """
        batches = None if rows is None else math.ceil(rows / step.batch)
        asked = self._asked_for(trainer, "limit_train_batches")
        if isinstance(asked, float) and asked > 0 and rows is not None and asked * math.ceil(rows / step.total) < 1:
            raise InvalidInputError(
                f"trainer.limit_train_batches={asked} is less than one of the {math.ceil(rows / step.total)} optimizer "
                "steps in an epoch: give a larger fraction, or a number of steps."
            )
        limit = in_batches(asked, step.accumulated, batches)
        self._change(trainer, "limit_train_batches", limit)
        if batches is not None:
            batches = min(batches, int(limit)) if isinstance(limit, int) else int(batches * limit)
        every = in_batches(self._asked_for(trainer, "val_check_interval"), step.accumulated, batches)
        self._change(trainer, "val_check_interval", every)

    def _asked_for(self, trainer: Trainer, name: str) -> Any:
        value, record = getattr(trainer, name), _record(trainer)
        return record.asked[name] if name in record.set and record.set[name] == value else value

    def _change(self, trainer: Trainer, name: str, value: Any) -> None:
        record = _record(trainer)
        record.asked[name], record.set[name] = self._asked_for(trainer, name), value
        setattr(trainer, name, value)
        setattr(trainer, _KEPT, record)


def _record(trainer: Trainer) -> _Record:
    record: _Record = getattr(trainer, _KEPT, None) or _Record()
    return record


def in_batches(value: Any, accumulated: int, batches: int | None) -> Any:
    """Convert a number of optimizer steps, or a fraction of an epoch, to batches: whole steps, at least one.

    Args:
        value: A number of steps, or as a float a fraction of an epoch; anything else (a time) stays as it is.
        accumulated: Number of batches in a step.
        batches: Number of batches in an epoch, whose last step may have fewer; None if it is not known.

    >>> [in_batches(value, 4, 42) for value in (3, 11, 12, 0.25, 0.01, 1.0)]
    [12, 42, 48, 8, 4, 1.0]
    """
    if accumulated == 1 or isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if isinstance(value, int):
        return StepInterval(value, accumulated, batches)
    if value == 1.0 or batches is None:
        return value
    steps = int(value * math.ceil(batches / accumulated))
    return StepInterval(max(steps, 1), accumulated, batches) if value else value


class StepInterval(int):
    """An interval in optimizer steps, as a number of batches; the last step of an epoch may have fewer batches.

    Lightning validates if the number of batches so far is divisible by the interval. The remainder is computed in steps
    here, so that an incomplete last step of an epoch counts as a whole one.

    >>> [batch for batch in range(1, 7) if batch % StepInterval(1, 4, 6) == 0]
    [4, 6]
    """

    def __new__(cls, steps: int, accumulated: int, batches: int | None) -> StepInterval:
        """Compute the number of batches, limited to an epoch if the steps are."""
        whole = steps * accumulated
        ends = batches is not None and batches < whole < batches + accumulated
        interval = super().__new__(cls, batches if ends and batches is not None else whole)
        interval._whole, interval._accumulated, interval._batches = whole, accumulated, batches
        return interval

    _whole: int
    _accumulated: int
    _batches: int | None

    def __rmod__(self, count: int) -> int:
        """Return the number of batches, in whole steps, since the last multiple of the interval."""
        epochs, rest = divmod(count, self._batches) if self._batches else (0, count)
        steps = math.ceil((self._batches or 0) / self._accumulated)
        return (epochs * steps * self._accumulated + rest) % self._whole

    def __deepcopy__(self, memo: Any) -> StepInterval:
        """Return itself, because it is immutable."""
        return self


def continue_with(trainer: Trainer, before: Mapping[str, int], now: StepBatch, streaming: bool) -> None:
    """Continue a run whose steps may have consisted of other batches.

    Warns if a step now has a different number of examples. Lightning's counts of batches in the checkpoint being loaded
    are converted to the present batch size. (The count within the current epoch is left to
    :class:`milora_lightning.data.batches.resuming.Resumption`, unless the data are a stream.)

    Args:
        trainer: The Trainer that restores the checkpoint.
        before: ``examples`` of a step, and of a ``batch`` over all devices, when the checkpoint was written.
        now: The composition of a step now.
        streaming: Whether the data are a stream.
    """
    if before["examples"] != now.total and not _is_scheduled(trainer):
        warn(
            f"The checkpoint was trained with {before['examples']} examples a step, and this run goes on with "
            f"{now.in_words}: to train as before, set data.global_batch_size: {before['examples']}."
        )
    loop = checkpoint_being_loaded(trainer).get("loops", {}).get("fit_loop", {})
    progress = loop.get("epoch_loop.batch_progress", {})
    for counts in (progress.get(part) for part in (("total", "current") if streaming else ("total",))):
        if counts:  # all by the same number: Lightning infers from their differences when the checkpoint was saved
            processed = counts["processed"]
            if streaming:  # a stream has as many batches as the run's steps need, including those already done
                batches = processed - before.get("undone", 0)
                if (before["batch"], before["examples"]) != (now.batch, now.total):
                    batches = batches * before["batch"] // before["examples"] * now.accumulated
            else:
                batches = round(processed * before["batch"] / now.batch)
            counts.update({name: value + batches - processed for name, value in counts.items()})


def _is_scheduled(trainer: Trainer) -> bool:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
