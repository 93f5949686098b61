"""The mean of losses over all tokens of an evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Mean loss over the tokens of all batches and ranks, in nats.

    If a loss is not finite, neither is the mean; ``torchmetrics.MeanMetric`` would ignore NaN.

    >>> metric = MeanLoss()
    >>> metric.update(torch.tensor(10.0), torch.tensor(1))
    >>> metric.update(torch.tensor(9.0), torch.tensor(9))
    >>> metric.compute()
    tensor(1.9000)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, total: Tensor, tokens: Tensor) -> None:
        """Add a batch.

        Args:
            total: The sum of the losses of its tokens.
            tokens: Their number.
        """
        self.total += total.detach()
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Return the mean, NaN if there were no tokens."""
        return self.total / self.tokens
