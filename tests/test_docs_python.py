"""The Python blocks of README and guides run, those of a page one after another, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from helpers.models import quiet_trainer, tiny_model
from helpers.pages import PAGES, ROOT, blocks, read
from helpers.trained import fit
from torch import Tensor, nn

from milora_lightning import CausalLMModule


class Small(lightning.pytorch.LightningModule):
    """A module of somebody's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 40))

    def train_dataloader(self) -> list[Tensor]:
        return [torch.ones(2, 40)] * 2

    def training_step(self, batch: Tensor) -> Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a conversational model."""
    return fit(tmp_path_factory.mktemp("trained"), "chat")


def with_checkpoint(path: str) -> Callable[[Path, Path], dict[str, Any]]:
    """Put the checkpoint where a page has it."""

    def prepare(folder: Path, checkpoint: Path) -> dict[str, Any]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(checkpoint)
        return {}

    return prepare


def with_module(folder: Path, checkpoint: Path) -> dict[str, Any]:
    model = tiny_model()
    model.config.max_position_embeddings = 64
    return {"your_module": Small(), "model": model, "Trainer": lightning.pytorch.Trainer}


def with_hugging_face(folder: Path, checkpoint: Path) -> dict[str, Any]:
    return {"hf_module": CausalLMModule.load_from_checkpoint(checkpoint, map_location="cpu")}


def nothing(folder: Path, checkpoint: Path) -> dict[str, Any]:
    return {}


PREPARED: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "README.md": with_module,
    "docs/chat.md": with_checkpoint("runs/milora/last.ckpt"),
    "docs/checkpoints.md": with_checkpoint("last.ckpt"),
    "docs/devices.md": with_module,
    "docs/lightning.md": with_module,
    "docs/screen.md": with_module,
    "docs/serving.md": with_checkpoint("runs/milora/last.ckpt"),
    "docs/start/own_project.md": with_hugging_face,
}
"""What the blocks of a page find there before the first one."""

WITH_PYTHON = [path for path in PAGES if blocks(read(path), "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(page: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        lightning.pytorch, "Trainer", lambda **given: quiet_trainer(tmp_path, **{"max_epochs": 1, **given})
    )
    names = PREPARED.get(str(page.relative_to(ROOT)), nothing)(tmp_path, checkpoint)
    for block in blocks(read(page), "python"):
        exec(compile(block, str(page), "exec"), names)
