"""Statistics of data for tiny models that start from them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from helpers.models import tiny_model
from milora_lightning import LoRAConfig, inject
from milora_lightning.starts import Statistics, find_start
from milora_lightning.statistics.collecting import in_groups, layers_with_needs
from milora_lightning.statistics.passes import Pass

FROM_DATA = ["corda", "corda_ipm", "lora_null", "eva", "astra", "astra_ipm", "sc_lora", "sc_lora 0.8"]
FROM_DATA += ["lora_ga", "lora_one"]


def token_batches(number: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of two rows for a tiny language model, the first row with padding at its end."""
    ids = torch.randint(0, 128, (number, 2, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[:, 0, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return [{"input_ids": i, "attention_mask": m, "labels": each} for i, m, each in zip(ids, mask, labels, strict=True)]


def told(kind: str, dtype: torch.dtype, init: str) -> dict[str, Statistics] | None:
    """What data tell about a tiny model, if a start takes anything from them."""
    return _everything(kind, dtype) if find_start(init).needs else None


@cache
def _everything(kind: str, dtype: torch.dtype) -> dict[str, Statistics]:
    model = tiny_model(kind, dtype)
    inject(model, LoRAConfig(r=4, init="sc_lora"))
    layers, _ = layers_with_needs(model)
    over = Pass(model, token_batches(), lambda batch: model(**batch), lambda batch: batch, torch.device("cpu"))
    (group,) = in_groups(layers, ("inputs", "preserved", "gradient"), over, token_batches(1, seed=1), 2**40)
    return group
