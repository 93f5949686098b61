"""The optimizer and schedule of a module, and the weighting of tokens in optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from milora_lightning.strategies.base import clips_itself, gradient_norm
from milora_lightning.training.accumulation import StepLoss, TokenWindow, accumulates
from milora_lightning.training.lora_plus import make_optimizer, set_rates
from milora_lightning.training.resuming import KEY, check_same, check_whole, describe, options, tell_differences
from milora_lightning.training.schedules import (
    check_length,
    check_schedule,
    follows_loss,
    make_schedule,
    run_length,
    set_rate,
)
from milora_lightning.utils.errors import InvalidInputError


class OptimizedModule(LightningModule):
    """A module whose optimizer steps give every token the same weight, with one optimizer and a schedule.

    Attributes:
        step_loss: The loss of the current optimizer step or, between steps, of the last one.

    Args:
        optimizer: Creates the optimizer from the trainable parameters.
        lr_scheduler: Name of a schedule of ``transformers.get_scheduler``.
        warmup_steps: Number of optimizer steps over which the rate rises from zero, or, below 1, a fraction of the run.
        lr_scheduler_kwargs: Arguments of the schedule.
        learning_rate: The peak learning rate, instead of the optimizer's.

    Raises:
        ValueError: If the schedule or its arguments are unknown; in ``setup`` or ``configure_optimizers`` if it needs
            the length of the run and the run has no end; when training is resumed from a checkpoint that has no
            training state, or that of another optimizer.
    """

    loraplus_lr_ratio: float | None = None
    """Ratio of B's learning rate to A's, as in LoRA+; None for one rate."""

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: str,
        warmup_steps: int | float,
        lr_scheduler_kwargs: dict[str, Any] | None,
        learning_rate: float | None,
    ) -> None:
        super().__init__()
        check_schedule(lr_scheduler, warmup_steps, lr_scheduler_kwargs or {})
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup_steps = warmup_steps
        self.lr_scheduler_kwargs = lr_scheduler_kwargs or {}
        self.learning_rate = learning_rate
        self.step_loss = StepLoss()
        self._window = TokenWindow()
        self._counted: Tensor | None = None  # number of tokens in the loss whose backward comes next
        self._length = math.inf
        self._given: list[dict[str, Any]] = []
        self._resumed: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Refuse a run without an end if the schedule needs one, before the model is loaded."""
        if stage == "fit" and self.trainer.max_epochs == self.trainer.max_steps == -1:
            check_length(self.lr_scheduler, self.warmup_steps, self.lr_scheduler_kwargs, math.inf)

    def mean_over_ranks(self, total: Tensor, tokens: Tensor) -> Tensor:
        """Return a loss whose gradient, averaged over ranks, is that of the mean over all ranks' tokens.

        The losses of all ranks are added to :attr:`step_loss`.

        Args:
            total: The sum of the losses of this rank's tokens.
            tokens: The number of these tokens.
        """
        strategy = self.trainer.strategy
        self._counted = strategy.reduce(tokens, reduce_op="sum")
        # A copy, because strategies sum in place.
        self.step_loss.add(strategy.reduce(total.detach().clone(), reduce_op="sum"), self._counted)
        return total * self.trainer.world_size / self._counted.clamp(min=1)

    def follow(self, loss: Tensor) -> None:
        """Pass the validation loss to a schedule that follows it."""
        for config in self.trainer.lr_scheduler_configs:
            if follows_loss(config.scheduler):
                cast(Any, config.scheduler).step(loss.item())

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; when several batches are accumulated, weight each by its number of tokens."""
        counted, self._counted = self._counted, None
        accumulated = self.trainer.accumulate_grad_batches
        if accumulated > 1 and counted is not None:  # the Trainer has already divided by it
            loss = loss * (accumulated * self._window.add(counted))
        super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Set gradients to zero and start counting tokens again."""
        self._window.clear()
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Average the accumulated gradient over its tokens, before callbacks and clipping see it, and step."""

        def closure() -> Any:
            result = optimizer_closure() if optimizer_closure is not None else None
            self.step_loss.end()
            self._window.average(p for group in optimizer.param_groups for p in group["params"])
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient (before clipping) and the learning rate."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.log("grad_norm", gradient_norm(self.trainer.strategy, gradients))
        rate = optimizer.param_groups[0]["lr"]
        if not isinstance(rate, Tensor):  # copying a number to the device would wait for the backward pass
            rate = torch.full((), rate, device=self.device)
        self.log("lr", rate, prog_bar=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient; under FSDP1 by norm as well, which Lightning does not support."""
        wrapped = clips_itself(self.trainer.strategy)
        if wrapped is not None and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            wrapped.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Create the optimizer of the trainable parameters and its schedule for the whole run."""
        trained = [p for p in self.parameters() if p.requires_grad]
        if any(p.dtype == torch.float16 for p in trained):
            raise InvalidInputError(
                "Weights that train in float16 would lose small updates, and their gradients cannot be scaled: load "
                "the model in float32 (model.dtype: float32), with trainer.precision: 16-mixed to compute in float16."
            )
        optimizer = make_optimizer(self.optimizer, self, self.loraplus_lr_ratio)
        if isinstance(optimizer, torch.optim.LBFGS) and accumulates(self.trainer):
            raise InvalidInputError(
                "LBFGS computes the loss several times in a step, which does not work with accumulate_grad_batches or "
                "a GradientAccumulationScheduler: use larger batches, or another optimizer."
            )
        if self.learning_rate is not None:
            set_rates(optimizer, self.learning_rate)
        self._length = run_length(self.trainer)
        arguments = self.warmup_steps, self.lr_scheduler_kwargs, self._length
        scheduler = make_schedule(self.lr_scheduler, optimizer, *arguments)
        self._given = options(optimizer)
        # False, because Lightning would pass the last validation loss to the schedule again after every step.
        config = {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": cast(Any, config)}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance a schedule that counts steps; one that follows the loss is advanced by :meth:`follow`."""
        if not follows_loss(scheduler):
            super().lr_scheduler_step(scheduler, metric)

    def on_fit_start(self) -> None:
        """Refuse to resume with another optimizer."""
        self._check_resumed()

    def on_train_start(self) -> None:
        """Report settings restored from a checkpoint, and apply a learning rate that was given or found."""
        self.step_loss.end()  # in case an earlier run was interrupted
        if not self._given:  # a subclass overrides configure_optimizers
            return
        optimizer, schedule = self._optimization()
        if follows_loss(schedule) and not sum(self.trainer.num_val_batches):
            raise InvalidInputError(
                f"lr_scheduler {self.lr_scheduler!r} follows val_loss, and there is no validation data: give the data "
                "a validation split, or choose a schedule that counts steps."
            )
        if self._resumed is not None:
            now = describe(optimizer, self.lr_scheduler, self._length)
            tell_differences(self._resumed, now, self._given, optimizer)
            self._resumed = None
        if self.learning_rate is not None and options(optimizer)[0]["lr"] != self.learning_rate:
            set_rate(optimizer, schedule, self.learning_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add a description of the optimizer and the schedule."""
        if self._given and checkpoint.get("optimizer_states"):
            optimizer, _ = self._optimization()
            checkpoint[KEY] = describe(optimizer, self.lr_scheduler, self._length)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume from a checkpoint without training state."""
        if self._is_fitting:
            check_whole(checkpoint)
            self._resumed = checkpoint
            self._check_resumed()

    @property
    def _is_fitting(self) -> bool:
        """Whether a Trainer is fitting this module now."""
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def _check_resumed(self) -> None:
        # Sharded models are restored after on_fit_start, other models before the optimizer exists.
        if self._resumed is not None and self._given and self.trainer.optimizers:
            check_same(self._resumed, *self._optimization())

    def _optimization(self) -> tuple[torch.optim.Optimizer, Any]:
        schedules = self.trainer.lr_scheduler_configs  # empty when StochasticWeightAveraging replaces it on resuming
        return self.trainer.optimizers[0], schedules[0].scheduler if schedules else None


def loss_of_step(trainer: Trainer, module: LightningModule, outputs: Any) -> Tensor | None:
    """Return the loss to show after a training batch: that of the optimizer step, if one has ended.

    Args:
        trainer: The Trainer.
        module: The module; an :class:`OptimizedModule` weights the batches of a step by their tokens.
        outputs: The result of its ``training_step``.

    Returns:
        The loss without gradient, on its device; that of the batch for other modules; None if there is none.
    """
    if isinstance(module, OptimizedModule) and module.step_loss.begun:
        return module.step_loss.mean if module.step_loss.ended else None
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    # Lightning has divided it by accumulate_grad_batches.
    return loss * trainer.accumulate_grad_batches if isinstance(loss, Tensor) else None
