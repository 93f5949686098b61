"""Resuming from a checkpoint: what a run takes over from it, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from milora_lightning.training.schedules import follows_loss
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import inform, warn

KEY = "optimization"
"""The entry of a checkpoint that describes the optimizer and the schedule."""

_UNSEEN = {"params", "lr", "initial_lr"}
_SPEED = {"foreach", "fused", "capturable"}


def describe(optimizer: Optimizer, name: str, length: float) -> dict[str, Any]:
    """Describe the optimizer, the schedule and the length of the run in primitive types.

    Args:
        optimizer: The optimizer.
        name: Name of the schedule.
        length: Length of the run in optimizer steps.
    """
    length_known = length if length != float("inf") else None
    return {"optimizer": _name(optimizer), "lr_scheduler": name, "steps": length_known}


def options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return an optimizer's options for each group as given, with the peak learning rate as ``lr``."""
    return [
        {**{k: v for k, v in group.items() if k not in _UNSEEN}, "lr": group.get("initial_lr", group["lr"])}
        for group in optimizer.param_groups
    ]


def check_whole(checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint that holds weights only.

    Raises:
        ValueError: If the checkpoint has no training state.

    >>> check_whole({"optimizer_states": [], "lr_schedulers": []})
    """
    if "optimizer_states" not in checkpoint or "lr_schedulers" not in checkpoint:
        raise InvalidInputError(
            "The checkpoint holds weights only (save_weights_only: true), so training cannot be resumed from it: use "
            "one with the optimizer's state, or start a new run from these adapters with load_adapter(module, path)."
        )


def check_same(checkpoint: Mapping[str, Any], optimizer: Optimizer, schedule: object) -> None:
    """Refuse to resume with another optimizer, or another kind of schedule, than the checkpoint's.

    Args:
        checkpoint: A checkpoint that has passed :func:`check_whole`.
        optimizer: The optimizer of the run.
        schedule: The schedule of the run; None if a callback provides it.

    Raises:
        ValueError: If the state does not fit.
    """
    was = checkpoint.get(KEY, {})
    states: Sequence[Mapping[str, Any]] = checkpoint["optimizer_states"]
    groups = states[0]["param_groups"] if states else []
    # Older checkpoints do not name the optimizer, but their options show whether it is the same.
    foreign = bool(groups) and not (optimizer.defaults.keys() - _SPEED <= groups[0].keys())
    if was.get("optimizer", _name(optimizer)) != _name(optimizer) or foreign:
        raise InvalidInputError(
            f"The checkpoint holds the state of {was.get('optimizer', 'another optimizer')}, and this run's optimizer "
            f"is {_name(optimizer)}: resume with the same optimizer, or start a new run from the checkpoint's adapters "
            "with load_adapter(module, path)."
        )
    if groups and len(groups) != len(optimizer.param_groups):
        raise InvalidInputError(
            f"The checkpoint's optimizer has {len(groups)} groups of parameters and this run's "
            f"{len(optimizer.param_groups)}: resume with the same loraplus_lr_ratio."
        )
    schedules = checkpoint["lr_schedulers"]
    if schedules and schedule is not None and follows_loss(schedule) != ("lr_lambdas" not in schedules[0]):
        raise InvalidInputError(
            f"The checkpoint's lr_scheduler ({was.get('lr_scheduler', 'another')}) and this run's are of different "
            "kinds, one follows the loss and the other counts steps: resume with the checkpoint's lr_scheduler."
        )


def tell_differences(
    checkpoint: Mapping[str, Any], now: Mapping[str, Any], given: list[dict[str, Any]], optimizer: Optimizer
) -> None:
    """Report which settings of the checkpoint override those of this run, and how the schedule changes.

    Args:
        checkpoint: The checkpoint that training is resumed from.
        now: The description of this run, from :func:`describe`.
        given: The optimizer's options before its state was restored.
        optimizer: The optimizer after its state was restored.
    """
    kept = {
        f"{key}={has[key]} (not {was[key]})"
        for was, has in zip(given, options(optimizer), strict=False)
        for key in was.keys() & has.keys() - _SPEED
        if was[key] != has[key]
    }
    if kept:
        warn(
            f"The optimizer continues as in the checkpoint, with {', '.join(sorted(kept))}. To change the highest "
            "learning rate, set the module's learning_rate."
        )
    before = checkpoint.get(KEY, {})
    if any(key in before and before[key] != now[key] for key in ("lr_scheduler", "steps")):
        was, has = (f"{x['lr_scheduler']} over {x['steps'] or 'unlimited'} steps" for x in (before, now))
        inform(f"From here on the learning rate follows {has}; up to the checkpoint it followed {was}.")


def _name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__.removesuffix('._multi_tensor')}.{type(optimizer).__name__}"
