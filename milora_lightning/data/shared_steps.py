"""The number of examples in optimizer steps and in each device's batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milora_lightning.data.batches.resuming import UNDONE, batches_since_step
from milora_lightning.data.batches.step_batch import StepBatch, StepOptions, continue_with, share_out
from milora_lightning.data.evaluation_loading import EvaluationLoaders
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import inform, warn

STEP = "step"
"""Entry of the state with the number of examples in an optimizer step and in a batch."""

BATCH = 16
"""Default number of training examples per device and batch."""


class SharedSteps(EvaluationLoaders):
    """Data module base class whose devices share the examples of each optimizer step.

    Attributes:
        batch_size: Training examples per device and batch; the maximum if ``global_batch_size`` is given.
        global_batch_size: Training examples in an optimizer step on all devices together, or None.
        max_tokens_per_batch: Tokens per device and batch instead of a number of examples, or None.
        streaming: Whether the training data are a stream.
    """

    streaming: bool

    def set_sizes(
        self, batch_size: int | None, global_batch_size: int | None, max_tokens_per_batch: int | None
    ) -> None:
        """Set the sizes of batches and steps.

        Raises:
            ValueError: If they conflict.
        """
        self.batch_size = min(BATCH, global_batch_size or BATCH) if batch_size is None else batch_size
        self.global_batch_size = global_batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self._step_options = StepOptions()
        self._said: set[str] = set()
        if self.batch_size > (global_batch_size or self.batch_size):
            raise InvalidInputError(
                f"batch_size={batch_size} is more than global_batch_size={global_batch_size}, the examples in an "
                "optimizer step on all devices together: set global_batch_size as well (null for none), or leave "
                "batch_size out."
            )
        if global_batch_size is not None and max_tokens_per_batch is not None:
            raise InvalidInputError(
                "global_batch_size fixes the number of examples in a step, and max_tokens_per_batch lets it vary: "
                "leave one of them out (null)."
            )

    def step_batch(self) -> StepBatch:
        """Return how the examples of an optimizer step are distributed.

        Raises:
            ValueError: If the devices cannot share ``global_batch_size``.
        """
        devices = self._rank()["num_replicas"]
        if self.global_batch_size is None:
            return StepBatch(devices, self.batch_size, getattr(self.trainer, "accumulate_grad_batches", 1))
        return share_out(self.global_batch_size, self.batch_size, devices)

    def accumulate(self) -> StepBatch:
        """Make the Trainer accumulate the batches of a step, report its composition, and return it."""
        step = self.step_batch()
        if self.global_batch_size is not None:
            if self.trainer is not None:
                self._step_options.accumulate(self.trainer, step)
            if step.devices > 1 or step.accumulated > 1:
                self.say(f"{step.in_words}.")
            return step
        if self.trainer is not None:
            self._step_options.restore(self.trainer)
            step = self.step_batch()
        if step.devices > 1 and self.max_tokens_per_batch is None:
            self.say(f"{step.in_words}; with data.global_batch_size it is the same on any number of devices.")
        return step

    def check_accumulated(self) -> None:
        """Warn if batches are parts of steps but are read by something other than a Trainer with this data module."""
        step = self.step_batch()
        if self.trainer is None and self.global_batch_size is not None and step.accumulated > 1:
            warn(
                f"global_batch_size={self.global_batch_size} is left to whoever takes these batches of "
                f"{step.examples}, as no Trainer has this data module: pass it to Trainer.fit as datamodule=, or "
                f"accumulate {step.accumulated} batches."
            )

    def counted_step(self, rows: int | None) -> StepBatch:
        """Return the composition of a step, and make the Trainer's options count steps if their size is given.

        Args:
            rows: Number of examples in an epoch; None if it is not known.
        """
        if self.trainer is None or self.global_batch_size is None:
            return self.step_batch()
        step = self.accumulate()  # again, because a BatchSizeFinder changes batch_size
        self._step_options.count_steps(self.trainer, step, rows)
        return step

    def state_of_steps(self) -> dict[str, Any]:
        """Return the entry of the state that describes steps; empty if they vary."""
        if self.max_tokens_per_batch is not None:
            return {}
        step = self.step_batch()
        return {STEP: {"examples": step.total, "batch": step.batch, UNDONE: batches_since_step(self.trainer)}}

    def continue_steps(self, state: Mapping[str, Any]) -> None:
        """Continue a run with this entry of its state, if steps are counted in examples here, too."""
        if self.trainer is None or self.trainer.state.fn != "fit" or self.max_tokens_per_batch is not None:
            return
        if STEP in state:
            continue_with(self.trainer, state[STEP], self.step_batch(), self.streaming)

    def say(self, text: str) -> None:
        """Inform the user, once."""
        if text not in self._said:
            self._said.add(text)
            inform(text)
