"""What the tests of exports share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.models import tiny_model
from helpers.starting import told
from milora_lightning import (
    LoRAConfig,
    initialize,
    inject,
    lora_layers,
)

IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def tuned(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A model that training has moved away from its base, which is in ``folder``."""
    tiny_model(kind, dtype).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    inject(model, LoRAConfig(**{"r": 4, "lora_alpha": 6, **options}))
    initialize(model, statistics=told(kind, dtype, options.get("init", "milora")))
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A.add_(torch.randn_like(layer.lora_A), alpha=0.1)
            layer.lora_B.add_(torch.randn_like(layer.lora_B), alpha=0.1)
    return model.eval()


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Move all that trains, as training would."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits
