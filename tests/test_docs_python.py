"""The Python blocks of README and guides run, those of a page one after another, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from helpers.chats import folder_of
from helpers.models import quiet_trainer, write_examples
from helpers.pages import PAGES, ROOT, blocks, read
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule
from milora_lightning.data import Files


class Small(lightning.pytorch.LightningModule):
    """A module of somebody's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 40))

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(4, 40), batch_size=2)  # type: ignore[arg-type]

    def training_step(self, batch: Tensor) -> Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a conversational model, trained for a step."""
    folder = tmp_path_factory.mktemp("trained")
    base = folder_of(folder / "base", "qwen")
    data = SFTDataModule(Files(str(write_examples(folder / "train.jsonl", 2))), base, template="chat", max_length=64)
    trainer = quiet_trainer(folder, max_steps=1, callbacks=[MiLoRAInit(r=4)])
    trainer.fit(CausalLMModule(base, warmup_steps=0), data)
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def with_checkpoint(path: str) -> Callable[[Path, Path], dict[str, Any]]:
    """Put the checkpoint where a page has it."""

    def prepare(folder: Path, checkpoint: Path) -> dict[str, Any]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(checkpoint)
        return {}

    return prepare


def with_module(folder: Path, checkpoint: Path) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
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
    "docs/index.md": with_module,
    "docs/lightning.md": with_module,
    "docs/models.md": with_module,
    "docs/screen.md": with_module,
    "docs/serving.md": with_checkpoint("runs/milora/last.ckpt"),
    "docs/start/own_project.md": with_hugging_face,
}
"""What the blocks of a page find there before the first one."""

WITH_PYTHON = [path for path in PAGES if blocks(read(path), "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(page: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = {"max_epochs": 1, "enable_progress_bar": None}
    monkeypatch.setattr(lightning.pytorch, "Trainer", lambda **given: quiet_trainer(tmp_path, **{**quiet, **given}))
    names = PREPARED.get(str(page.relative_to(ROOT)), nothing)(tmp_path, checkpoint)
    for block in blocks(read(page), "python"):
        exec(compile(block, str(page), "exec"), names)
