"""What the tests of named share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from helpers.models import tiny_model


class Module(LightningModule):
    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> None:
        super().__init__()
        self.lm = wrap(tiny_model())

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.lm(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
