"""FSDP2 in a module of your own: inject before fully_shard, and MiLoRAInit fills the factors of the shards.

torchrun --nproc-per-node 2 examples/own_fully_shard.py
"""

import os

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from milora_lightning import LoRAConfig, MiLoRAInit, inject


class Sharded(LightningModule):
    """Shards its layers itself, as large models do."""

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))  # yours would load pretrained weights
        inject(self, LoRAConfig(r=4))  # the same settings as MiLoRAInit's
        for layer in self.model:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.model(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)


if __name__ == "__main__":
    devices = int(os.environ["LOCAL_WORLD_SIZE"])  # of torchrun
    milora = MiLoRAInit(r=4)
    trainer = Trainer(max_epochs=1, devices=devices, strategy="milora_fsdp2", callbacks=[milora], logger=False)
    trainer.fit(Sharded(), DataLoader(TensorDataset(torch.randn(128, 64)), batch_size=16))
