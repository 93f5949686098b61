"""Memory and surgery under FSDP2 on two processes, against one process that holds the model whole.

A random Llama of about half a gigabyte, written as safetensors: every process is fresh, has one thread, and runs on the
CPU. The memory is the process's own (anonymous pages, sampled), above what it had with everything imported; pages
of files that are read are the system's and not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import publish, table
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from milora_lightning import CausalLMModule, MiLoRAInit

ROUNDS, STEPS, LENGTH = 3, 3, 64
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=8,
    dtype="float32",
)


class Peak:
    """The most anonymous memory of this process since the last look, sampled all the while."""

    def __init__(self) -> None:
        self.start, self.most = anonymous(), 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def take(self) -> int:
        most, self.most = max(self.most, anonymous()), 0
        return most - self.start


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Stages(Callback):
    """Notes the peak of each stage and the time of the surgery. Listed first, MiLoRAInit puts itself before it."""

    def __init__(self) -> None:
        self.peak = Peak()
        self.found: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found.setdefault("model", self.peak.take())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["surgery"] = self.peak.take()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["training"] = self.peak.take()


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, all of them supervised."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 1024, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
