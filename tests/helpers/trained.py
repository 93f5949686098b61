"""What the tests of trained share."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from helpers.chats import folder_of
from helpers.models import quiet_trainer, write_examples
from milora_lightning import (
    CausalLMModule,
    MiLoRAInit,
    SFTDataModule,
)
from milora_lightning.cli.main import main
from milora_lightning.data import Files


def fit(folder: Path, template: str, adapters: bool = True) -> Path:
    """Train a small model for a few steps, far enough to answer otherwise, and return its checkpoint."""
    torch.manual_seed(3)  # some models answer the same with adapters and without
    base = folder_of(folder / "base", "qwen")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.max_position_embeddings = 1024
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 8 if parameter.ndim == 2 else 1  # so that answers hang on what is asked
    model.save_pretrained(base)
    data = SFTDataModule(Files(str(write_examples(folder / "train.jsonl", 8))), base, template=template, max_length=256)
    lm = CausalLMModule(base, max_new_tokens=8, warmup_steps=0, learning_rate=0.01)
    trainer = quiet_trainer(folder, max_epochs=4, callbacks=[MiLoRAInit(r=4, init="milora" if adapters else "full")])
    trainer.fit(lm, data)
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def train(folder: Path, template: str) -> Path:
    """Fill a folder with a base, a checkpoint and both exports."""
    checkpoint = fit(folder, template)
    for format in ("peft", "merged"):
        main(["export", "--ckpt_path", str(checkpoint), "--output", str(folder / format), "--format", format])
    return folder
