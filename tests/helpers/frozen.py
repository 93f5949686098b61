"""What the tests of frozen share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.models import quiet_trainer
from milora_lightning import MiLoRAInit

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


class Judged(LightningModule):
    """A network, and a frozen one that measures it."""

    def __init__(self, frozen: str = "judge") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.judge = mlp(), mlp()
        for name in frozen.split():
            getattr(self, name).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.judge(self.net(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(X, batch_size=16)


def fit(lm: LightningModule, folder: Path, /, **options: Any) -> LightningModule:
    callback = MiLoRAInit(**{"r": 4, "cache": False, **options})
    quiet_trainer(folder, callbacks=[callback], max_epochs=2).fit(lm)
    return lm
