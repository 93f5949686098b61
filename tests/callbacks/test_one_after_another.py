"""Monitors that one after another measures several models: each is compared with its own start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.callback_modules import LanguageModel, Regression
from helpers.models import quiet_trainer, tiny_tokenizer
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from milora_lightning import ForgettingMonitor, MiLoRAInit, UpdateMonitor, lora_layers


def test_models_that_train_in_full_forget_what_they_knew_themselves(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"What is {i} plus {2 * i}?" for i in range(20)))
    monitor = ForgettingMonitor(str(tmp_path / "text.txt"), block_length=16, max_tokens=64)
    found: list[float] = []

    class Measured(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.append(monitor.measure(trainer, pl_module)["forgetting_kl"])

        on_train_end = on_train_start

    for spread in (0.0, 0.1):
        module = LanguageModel()
        module.configure_model()
        module.tokenizer = tiny_tokenizer()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=spread)
        quiet_trainer(tmp_path, max_steps=2, callbacks=[monitor, Measured()]).fit(module)
    assert found[::2] == [0, 0]
    assert min(found[1::2]) > 1e-5


def test_updates_are_those_of_the_module_that_trains(tmp_path: Path) -> None:
    monitor, logged = UpdateMonitor(batches=0), []
    for width in (24, 16):
        module = Regression()
        module.net = nn.Sequential(nn.Linear(12, width), nn.GELU(), nn.Linear(width, 10))
        options = {"max_steps": 8, "limit_val_batches": 1, "callbacks": [MiLoRAInit(r=4, cache=False), monitor]}
        trainer = quiet_trainer(tmp_path, **options)
        trainer.fit(module)
        layers = lora_layers(module).values()
        sizes = torch.stack([layer.delta_weight().norm() / layer.base_layer.weight.norm() for layer in layers])
        logged.append(trainer.callback_metrics["update_size"].item())
        assert logged[-1] == pytest.approx(sizes.mean().item(), rel=1e-4)
    assert min(logged) > 0
    assert logged[0] != pytest.approx(logged[1], rel=1e-2)
