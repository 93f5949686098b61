"""What the tests of callback modules share."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.models import tiny_model, tiny_tokenizer
from milora_lightning import LoRAConfig, initialize, inject, lora_layers


class Regression(LightningModule):
    """Built in ``setup``: a small network that is no language model."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module | None = None

    def setup(self, stage: str) -> None:
        if self.net is None:
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[0][:, :10])

    validation_step = test_step = training_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(64, 12, generator=torch.Generator().manual_seed(0))), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class LanguageModel(LightningModule):
    """Built in ``configure_model``: a Hugging Face model, in eval mode as ``from_pretrained`` leaves it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base_dtype = dtype
        self.lm: nn.Module | None = None

    def configure_model(self) -> None:
        if self.lm is None:
            self.lm = tiny_model("gpt2", self.base_dtype).eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm(ids).logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.lm(batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        ids = torch.randint(0, 128, (48, 10), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(ids), batch_size=4)


def adapted_language_model(moved: bool = False) -> LanguageModel:
    """Make a language model with a tokenizer and adapters, at their start or moved away from it."""
    module = LanguageModel()
    module.configure_model()
    module.tokenizer = tiny_tokenizer()
    inject(module, LoRAConfig(r=2))
    initialize(module)
    if moved:
        with torch.no_grad():
            for layer in lora_layers(module).values():
                layer.lora_B.add_(0.1)
    return module
