"""Estimates how long a training run will still take."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from milora_lightning.training.schedules import run_length


def evaluations(batches: float, epoch: float, every: float, epochs: int | None) -> float:
    """Return how many evaluations take place within the first batches of a run.

    Args:
        batches: Number of training batches.
        epoch: Number of batches in an epoch.
        every: Number of batches between two evaluations, counted within each epoch.
        epochs: Evaluate only in every ``epochs``-th epoch; None counts batches across epochs.

    >>> evaluations(100, 40, 20, 1), evaluations(100, 40, 40, 2), evaluations(100, 40, 30, None)
    (5, 1, 3)
    """
    if not math.isfinite(batches) or not math.isfinite(every) or every <= 0:
        return 0
    if epochs is None or not math.isfinite(epoch) or epoch <= 0:
        return batches // every
    whole, rest = divmod(batches, epoch)
    begun = rest // every if (whole + 1) % epochs == 0 else 0
    return (whole // epochs) * (epoch // every) + begun


def seconds_left(trainer: Trainer, step: float, evaluation: float) -> float | None:
    """Estimate the seconds that training will still take, including evaluations.

    Args:
        trainer: A Trainer during training.
        step: Seconds per optimizer step.
        evaluation: Seconds per evaluation; 0 if not known.

    Returns:
        The seconds; None if the run has no known end.
    """
    left = math.inf
    steps = run_length(trainer)
    if math.isfinite(steps):
        ahead = max(0.0, steps - trainer.global_step)
        batch = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        due = 0.0
        if trainer.enable_validation and sum(trainer.num_val_batches) > 0:
            schedule = (
                trainer.num_training_batches,
                trainer.val_check_batch or math.inf,
                trainer.check_val_every_n_epoch,
            )
            until = batch + ahead * trainer.accumulate_grad_batches
            due = evaluations(until, *schedule) - evaluations(batch, *schedule)
        left = ahead * step + max(0.0, due) * evaluation
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer) and (limit := callback.time_remaining()) is not None:
            left = min(left, max(0.0, limit))
    return left if math.isfinite(left) else None
