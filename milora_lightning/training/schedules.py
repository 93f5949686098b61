"""Learning-rate schedules: those of transformers, for runs of known or unknown length."""

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

from milora_lightning.training.lora_plus import RATIO
from milora_lightning.utils.compat.torch import set_last_lr
from milora_lightning.utils.counting import counted
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

WARMUP = 0.03
"""The default warm-up, as a fraction of the run."""

# Schedules that follow val_loss instead of counting steps; only newer versions of transformers have the second.
_FOLLOWING = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": getattr(optimization, "GreedyLR", None)}
_GIVEN = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def check_schedule(name: str, warmup_steps: float, arguments: Mapping[str, Any]) -> None:
    """Refuse a schedule that does not exist, or arguments that it does not take.

    Args:
        name: Name of a schedule of ``transformers.get_scheduler``.
        warmup_steps: Number of optimizer steps, or, below 1, a fraction of the run.
        arguments: Arguments of the schedule itself.

    Raises:
        ValueError: If the schedule or its arguments are unknown.

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
            f"warmup_steps must be a whole number of steps or, below 1, a fraction of the run, not {warmup_steps}."
        )
    takes = _parameters(name)
    accepted = [parameter for parameter in takes if parameter not in _GIVEN]
    unknown = [argument for argument in arguments if argument not in accepted]
    if unknown:
        raise InvalidInputError(
            f"lr_scheduler {name!r} does not take {', '.join(unknown)}: its lr_scheduler_kwargs are "
            f"{', '.join(accepted) or 'none'}."
        )
    missing = [p for p in accepted if takes[p].default is inspect.Parameter.empty and p not in arguments]
    if missing:
        raise InvalidInputError(f"lr_scheduler {name!r} needs lr_scheduler_kwargs with {', '.join(missing)}.")


def check_length(name: str, warmup_steps: float, arguments: Mapping[str, Any], length: float) -> None:
    """Refuse a schedule that needs the length of a run whose length is not known.

    Args:
        name: Name of the schedule.
        warmup_steps: As for :func:`make_schedule`.
        arguments: Arguments of the schedule itself.
        length: Length of the run in optimizer steps; infinite if it is not known.

    Raises:
        ValueError: If the schedule depends on the length and the length is infinite.

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
                f"{key}={value} is a fraction of the run, and the number of its steps is not known: give a number of "
                "steps, or set the Trainer's max_steps or max_epochs."
            )


def make_schedule(
    name: str, optimizer: Optimizer, warmup_steps: float, arguments: Mapping[str, Any], length: float
) -> LRScheduler:
    """Make a learning-rate schedule for a run.

    Args:
        name: Name of a schedule of ``transformers.get_scheduler``.
        optimizer: The optimizer whose learning rates it sets.
        warmup_steps: Number of optimizer steps over which the rate rises from zero, or, below 1, a fraction of the run.
        arguments: Arguments of the schedule itself (``min_lr``, ``num_cycles``, …); numbers of steps may be fractions
            of the run, too.
        length: Length of the run in optimizer steps; infinite if it is not known.

    Returns:
        The schedule, of one of the kinds that :func:`follows_loss` distinguishes.

    Raises:
        ValueError: If the schedule does not work with its arguments, the optimizer or the length.
    """
    check_length(name, warmup_steps, arguments, length)
    if any(group["lr"] is None for group in optimizer.param_groups):
        raise InvalidInputError(
            f"{type(optimizer).__name__} with these options chooses its own learning rate, so no schedule can set it: "
            "give it lr (transformers' Adafactor also needs relative_step: false and scale_parameter: false)."
        )
    warmup = _steps(warmup_steps, length)
    _tell_of_warmup(name, optimizer, warmup_steps, warmup, length)
    options = {key: _steps(value, length) if key.endswith("_steps") else value for key, value in arguments.items()}
    decay = options.get("num_decay_steps", 0)
    if name == "warmup_stable_decay" and "num_stable_steps" not in options and 0 < length < warmup + decay:
        raise InvalidInputError(
            f"lr_scheduler {name!r}: a warm-up of {warmup} and a decay of {decay} steps are more than the run's "
            f"{length:.0f}. Make the run longer, or give warmup_steps and num_decay_steps as shares of it, such as "
            f"{WARMUP} and 0.2."
        )
    # warmup_stable_decay takes either num_training_steps or num_stable_steps.
    steps = None if math.isinf(length) or "num_stable_steps" in options else int(length)
    try:
        schedule: LRScheduler = get_scheduler(name, optimizer, warmup, steps, options)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"lr_scheduler {name!r} with lr_scheduler_kwargs {options}: {error}") from error
    return schedule


def follows_loss(schedule: object) -> bool:
    """Whether a schedule follows the validation loss instead of counting steps."""
    return isinstance(schedule, tuple(kind for kind in _FOLLOWING.values() if kind is not None))


def run_length(trainer: Trainer) -> float:
    """Return the number of optimizer steps in a run; infinite if only time or the user ends it.

    Raises:
        ValueError: If ``val_check_interval`` is longer than an epoch.
    """
    if trainer.limit_train_batches == 0:
        return 0  # Lightning does not load any data then
    try:
        length = trainer.estimated_stepping_batches
    except ValueError as error:
        if "`val_check_interval`" not in str(error):
            raise
        raise InvalidInputError(
            f"val_check_interval is {trainer.val_check_interval} batches, and an epoch has "
            f"{trainer.fit_loop.max_batches}: set check_val_every_n_epoch: null, so that batches are counted across "
            "epochs, or give a smaller number, or a fraction of the epoch such as 0.5."
        ) from error
    epochs, batches = trainer.max_epochs or 0, trainer.num_training_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # Lightning estimates with the accumulation factor of the first epoch.
        if isinstance(callback, GradientAccumulationScheduler) and epochs > 0 and math.isfinite(batches):
            factors = (callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs))
            length = sum(math.ceil(batches / factor) for factor in factors)
            length = length if trainer.max_steps == -1 else min(length, trainer.max_steps)
    return length if length >= 0 else math.inf


def set_rate(optimizer: Optimizer, schedule: object, rate: float) -> None:
    """Change the peak learning rate of a schedule, possibly during a run; groups keep their ratios.

    Args:
        optimizer: The optimizer.
        schedule: Its schedule.
        rate: The new peak learning rate.
    """
    rates = [rate * group.get(RATIO, 1) for group in optimizer.param_groups]
    if isinstance(schedule, LambdaLR):
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule.base_lrs = list(rates)
        set_last_lr(schedule, [highest * factor for highest, factor in zip(rates, factors, strict=True)])
    now = schedule.get_last_lr() if isinstance(schedule, LambdaLR) else rates
    for group, highest, lr in zip(optimizer.param_groups, rates, now, strict=True):
        group["initial_lr"], group["lr"] = highest, lr


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    function: Callable[..., Any] = _FOLLOWING.get(name) or TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    return dict(inspect.signature(function).parameters)


def _steps(value: float, length: float) -> int:
    """Return a number of steps, given as a number or, below 1, as a fraction of the run.

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
            f"The run has {counted(int(length), 'step')} and ends within its warm-up of {warmup}: the learning rate "
            f"will only reach {rate * (length - 1) / warmup:.3g} of {rate:.3g}. Give warmup_steps as a fraction of "
            f"the run, such as {WARMUP}, or a smaller number."
        )
