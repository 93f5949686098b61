"""Schedules of the learning rate: those of transformers, over a run whose length is known or not."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import SchedulerType, get_scheduler, optimization
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from milora_lightning.utils.compat import set_last_lr
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

WARMUP = 0.03
"""The share of a run over which the rate rises, unless another is given."""

# Those that follow val_loss instead of the steps, and take their class's arguments; the second is new in transformers.
_FOLLOWING = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": getattr(optimization, "GreedyLR", None)}
_GIVEN = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def check_schedule(name: str, warmup_steps: float, arguments: Mapping[str, Any]) -> None:
    """Refuse what no run could be scheduled by.

    Args:
        name: Of a schedule of ``transformers.get_scheduler``.
        warmup_steps: Number of optimizer steps, or below 1 the share of the run.
        arguments: Of the schedule itself.

    Raises:
        ValueError: If there is no such schedule, or not with these arguments.

    >>> check_schedule("cosin", 0, {})
    Traceback (most recent call last):
    milora_lightning.utils.errors.InvalidInputError: There is no lr_scheduler 'cosin'; did you mean 'cosine'? \
Known are: linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt, \
reduce_lr_on_plateau, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, greedy.
    """
    known = [kind.value for kind in SchedulerType if kind in TYPE_TO_SCHEDULER_FUNCTION]
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise InvalidInputError(f"There is no lr_scheduler {name!r}{hint} Known are: {', '.join(known)}.")
    if not (warmup_steps >= 0 and (warmup_steps < 1 or warmup_steps == int(warmup_steps))):
        raise InvalidInputError(
            f"warmup_steps must be a number of steps, or below 1 a share of the run, not {warmup_steps}."
        )
    takes = _parameters(name)
    own = [parameter for parameter in takes if parameter not in _GIVEN]
    unknown = [argument for argument in arguments if argument not in own]
    if unknown:
        raise InvalidInputError(
            f"lr_scheduler {name!r} does not take {', '.join(unknown)}: its lr_scheduler_kwargs are "
            f"{', '.join(own) or 'none'}."
        )
    missing = [p for p in own if takes[p].default is inspect.Parameter.empty and p not in arguments]
    if missing:
        raise InvalidInputError(f"lr_scheduler {name!r} needs lr_scheduler_kwargs with {', '.join(missing)}.")


def check_length(name: str, warmup_steps: float, arguments: Mapping[str, Any], length: float) -> None:
    """Refuse a schedule over a run without an end for which it needs one.

    Args:
        name: Of the schedule.
        warmup_steps: As for :func:`make_schedule`.
        arguments: Of the schedule itself.
        length: Of the run in optimizer steps; infinite if it is not known.

    Raises:
        ValueError: If the schedule depends on it and it is infinite.

    >>> check_length("constant", 0, {}, math.inf)
    >>> check_length("linear", 100, {}, math.inf)
    Traceback (most recent call last):
    milora_lightning.utils.errors.InvalidInputError: lr_scheduler 'linear' needs to know how many steps the run has, \
and it has no limit but time, if any: set the Trainer's max_steps or max_epochs (beside max_time), or lr_scheduler: \
constant_with_warmup.
    """
    if math.isfinite(length):
        return
    takes = _parameters(name)
    if "num_training_steps" in takes and "num_stable_steps" not in arguments:
        raise InvalidInputError(
            f"lr_scheduler {name!r} needs to know how many steps the run has, and it has no limit but time, if any: "
            "set the Trainer's max_steps or max_epochs (beside max_time), or lr_scheduler: constant_with_warmup."
        )
    shares = {"warmup_steps": warmup_steps if "num_warmup_steps" in takes else 0, **arguments}
    for key, value in shares.items():
        if key.endswith("_steps") and 0 < value < 1:
            raise InvalidInputError(
                f"{key}={value} is a share of the run, and how many steps that has is not known: give a number of "
                "steps, or set the Trainer's max_steps or max_epochs."
            )


def make_schedule(
    name: str, optimizer: Optimizer, warmup_steps: float, arguments: Mapping[str, Any], length: float
) -> LRScheduler:
    """Make a schedule of the learning rate over a run.

    Args:
        name: Of a schedule of ``transformers.get_scheduler``.
        optimizer: Whose rates are to follow it.
        warmup_steps: Number of optimizer steps over which the rate rises from zero, or below 1 the share of the run.
        arguments: Of the schedule itself (``min_lr``, ``num_cycles``, …); a number of steps may be a share, too.
        length: Of the run in optimizer steps; infinite if it is not known.

    Returns:
        The schedule; those that follow the loss are told apart by :func:`follows_loss`.

    Raises:
        ValueError: If the schedule does not go with its arguments, the optimizer or the length.
    """
    check_length(name, warmup_steps, arguments, length)
    if any(group["lr"] is None for group in optimizer.param_groups):
        raise InvalidInputError(
            f"{type(optimizer).__name__} as it is set chooses its own learning rate, which no schedule could follow: "
            "give it lr (transformers' Adafactor also needs relative_step: false and scale_parameter: false)."
        )
    warmup = _steps(warmup_steps, length)
    _tell_of_warmup(name, optimizer, warmup_steps, warmup, length)
    options = {key: _steps(value, length) if key.endswith("_steps") else value for key, value in arguments.items()}
    # warmup_stable_decay takes its length from either.
    steps = None if math.isinf(length) or "num_stable_steps" in options else int(length)
    try:
        schedule: LRScheduler = get_scheduler(name, optimizer, warmup, steps, options)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"lr_scheduler {name!r} with lr_scheduler_kwargs {options}: {error}") from error
    return schedule


def follows_loss(schedule: object) -> bool:
    """Whether a schedule is to be given the validation loss, and not to count steps."""
    return isinstance(schedule, tuple(kind for kind in _FOLLOWING.values() if kind is not None))


def run_length(trainer: Trainer) -> float:
    """Return how many optimizer steps a run has; infinite if it ends by time or by hand.

    Raises:
        ValueError: If validation is to come later than the end of an epoch.
    """
    if trainer.limit_train_batches == 0:
        return 0  # Lightning does not even ask for the data then
    try:
        length = trainer.estimated_stepping_batches
    except ValueError as error:
        if "`val_check_interval`" not in str(error):
            raise
        raise InvalidInputError(
            f"val_check_interval is {trainer.val_check_interval} batches, and an epoch has "
            f"{trainer.fit_loop.max_batches}: set check_val_every_n_epoch: null, so that they are counted over epochs, "
            "or give a smaller number, or a share of the epoch such as 0.5."
        ) from error
    epochs, batches = trainer.max_epochs or 0, trainer.num_training_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # Lightning's estimate is for the accumulation of the first epoch.
        if isinstance(callback, GradientAccumulationScheduler) and epochs > 0 and math.isfinite(batches):
            factors = (callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs))
            length = sum(math.ceil(batches / factor) for factor in factors)
            length = length if trainer.max_steps == -1 else min(length, trainer.max_steps)
    return length if length >= 0 else math.inf


def set_rate(optimizer: Optimizer, schedule: object, rate: float) -> None:
    """Make a schedule's highest learning rate another, also in the middle of a run."""
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = [rate for _ in optimizer.param_groups]
        set_last_lr(schedule, [rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas])
    now = schedule.get_last_lr() if isinstance(schedule, LambdaLR) else [rate] * len(optimizer.param_groups)
    for group, lr in zip(optimizer.param_groups, now, strict=True):
        group["initial_lr"], group["lr"] = rate, lr


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    function: Callable[..., Any] = _FOLLOWING.get(name) or TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    return dict(inspect.signature(function).parameters)


def _steps(value: float, length: float) -> int:
    """Return a number of steps that is given as such, or as a share.

    >>> _steps(100, 50), _steps(0.03, 1000), _steps(0.03, 6)
    (100, 30, 0)
    """
    return round(value * length) if 0 < value < 1 else int(value)


def _tell_of_warmup(name: str, optimizer: Optimizer, given: float, warmup: int, length: float) -> None:
    if "num_warmup_steps" not in _parameters(name):
        if given not in (0, WARMUP):
            warn(f"warmup_steps={given} has no effect: lr_scheduler {name!r} has no warm-up.")
    elif warmup >= length > 0:
        rate = optimizer.param_groups[0]["lr"]
        warn(
            f"The run's {length} steps end within its warm-up of {warmup}: the highest learning rate will be "
            f"{rate * (length - 1) / warmup:.3g} of {rate:.3g}. Give warmup_steps as a share of the run, such as "
            f"{WARMUP}, or fewer of them."
        )
