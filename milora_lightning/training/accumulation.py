"""Gradient accumulation in which every token (or example) of an optimizer step has the same weight, and its loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from milora_lightning.utils.compat.torch import multiply_together


def accumulates(trainer: Trainer) -> bool:
    """Return whether a run accumulates the gradients of several batches, even if only in later epochs."""
    schedules = (c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler))  # type: ignore[attr-defined]
    return trainer.accumulate_grad_batches > 1 or any(each.going_to_accumulate_grad_batches() for each in schedules)


class TokenWindow:
    """The micro-batches of one optimizer step. The i-th has n_i tokens, over which its mean loss is L_i.

    If losses are averaged over examples, read "examples" for "tokens" below.

    The mean over all tokens is Σ n_i L_i / T with T = Σ n_i, which is known only after the last micro-batch. Therefore
    gradients are accumulated relative to the first micro-batch, Σ (n_i / n_1) ∇L_i, and scaled by n_1 / T at the end.
    This keeps losses at their usual scale, as a ``GradScaler`` needs, and never synchronizes with the device.

    >>> weight = nn.Parameter(torch.zeros(()))
    >>> window = TokenWindow()
    >>> for loss, tokens in ((2 * weight, 1), (5 * weight, 9)):
    ...     (loss * window.add(torch.tensor(tokens))).backward()
    >>> window.average([weight])
    >>> weight.grad  # (1 × 2 + 9 × 5) / 10, where the mean of means would be 3.5
    tensor(4.7000)
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start a new optimizer step, as when gradients are set to zero."""
        self._unit: Tensor | None = None
        self._total: Tensor | None = None
        self._batches = 0

    def add(self, tokens: Tensor) -> Tensor:
        """Count a micro-batch.

        Args:
            tokens: Its number of tokens over all ranks; a scalar.

        Returns:
            The factor to multiply its mean loss by before backward.
        """
        first = tokens.clamp(min=1)
        if self._unit is None or self._total is None:
            self._unit, self._total = first, tokens
        else:  # no tokens and so no gradient yet: the reference can still change
            self._unit = torch.where(self._total == 0, first, self._unit)
            self._total = self._total + tokens
        self._batches += 1
        return tokens / self._unit

    @torch.no_grad()
    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Scale the accumulated gradients, in place, to the gradient of the mean over all tokens."""
        if self._batches < 2 or self._unit is None or self._total is None:
            return
        scale = self._unit / self._total.clamp(min=1)
        gradients: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            if (gradient := parameter.grad) is not None:
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                gradients[local.device].append(local)
        for device, tensors in gradients.items():
            multiply_together(tensors, scale.to(device))


class StepLoss:
    """The loss of an optimizer step: the mean over the tokens of all its micro-batches and ranks.

    It stays on its device, and the host never waits for it.

    Attributes:
        begun: Whether anything has been added.
        ended: Whether the next addition begins another step.

    >>> loss = StepLoss()
    >>> loss.add(torch.tensor(2.0), torch.tensor(1)), loss.add(torch.tensor(45.0), torch.tensor(9))
    (tensor(2.), tensor(4.7000))
    >>> loss.end()
    >>> loss.add(torch.tensor(3.0), torch.tensor(1))
    tensor(3.)
    """

    def __init__(self) -> None:
        self.begun, self.ended = False, True
        self._total: Tensor
        self._tokens: Tensor

    def add(self, total: Tensor, tokens: Tensor) -> Tensor:
        """Add a micro-batch.

        Args:
            total: The sum of the losses of its tokens, over all ranks; without gradient.
            tokens: The number of these tokens.

        Returns:
            The mean over the step's tokens so far.
        """
        if self.ended:
            self._total, self._tokens, self.begun, self.ended = total, tokens, True, False
        else:
            self._total, self._tokens = self._total + total, self._tokens + tokens
        return self.mean

    @property
    def mean(self) -> Tensor:
        """The mean over the tokens of this step so far or, if it has ended, of the whole step."""
        return self._total / self._tokens.clamp(min=1)

    def end(self) -> None:
        """End the step: the next addition begins another one."""
        self.ended = True
