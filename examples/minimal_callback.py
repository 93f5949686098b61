"""MiLoRA in a Lightning project: add the callback, change nothing else.

python examples/minimal_callback.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from milora_lightning import MiLoRAInit


class Regression(LightningModule):
    """Any LightningModule with linear layers; yours would load pretrained weights here."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)


if __name__ == "__main__":
    x = torch.randn(256, 16)
    trainer = Trainer(max_epochs=2, callbacks=[MiLoRAInit(r=4)], logger=False)
    trainer.fit(Regression(), DataLoader(TensorDataset(x, x.roll(1, dims=1)), batch_size=32, shuffle=True))
