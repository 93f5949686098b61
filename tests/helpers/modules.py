"""What the tests of modules share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.models import write_examples
from milora_lightning import CausalLMModule, SFTDataModule
from milora_lightning.data import Files


def data(folder: Path, model: Path, **options: Any) -> SFTDataModule:
    train, validation = write_examples(folder / "train.jsonl", 40), write_examples(folder / "validation.jsonl", 11)
    source = Files(str(train), str(validation), str(validation))
    defaults = {"template": "plain", "max_length": 64, "batch_size": 4, "num_generation_examples": 5}
    return SFTDataModule(source, str(model), **{**defaults, **options})


def module(model: Path, **options: Any) -> CausalLMModule:
    return CausalLMModule(str(model), **{"warmup_steps": 2, "max_new_tokens": 4, **options})
