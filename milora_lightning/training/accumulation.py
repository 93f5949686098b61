"""Gradients accumulated over micro-batches so that every token of an optimizer step counts the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from milora_lightning.utils.compat import multiply_together


class TokenWindow:
    """The micro-batches of one optimizer step, of which the i-th has n_i tokens and the mean loss L_i over them.

    The mean over all tokens is Σ n_i L_i / T with T = Σ n_i, which is not known before the last one. So gradients are
    accumulated in units of the first micro-batch's tokens, Σ (n_i / n_1) ∇L_i, and scaled by n_1 / T at the end. That
    keeps losses of the size they have, as a ``GradScaler`` needs, and asks a device for nothing in between.

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
        """Begin anew, as when gradients are set to zero."""
        self._unit: Tensor | None = None
        self._total: Tensor | None = None
        self._batches = 0

    def add(self, tokens: Tensor) -> Tensor:
        """Count a micro-batch.

        Args:
            tokens: Its number of tokens, over all ranks; a scalar.

        Returns:
            What its mean loss is to be multiplied by before its backward.
        """
        first = tokens.clamp(min=1)
        if self._unit is None or self._total is None:
            self._unit, self._total = first, tokens
        else:  # as long as there was no token, there was no gradient either, and the unit is free
            self._unit = torch.where(self._total == 0, first, self._unit)
            self._total = self._total + tokens
        self._batches += 1
        return tokens / self._unit

    @torch.no_grad()
    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Scale what has been accumulated to the gradient of the mean over all tokens, in place."""
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
