"""The logged metrics that count as results of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

Stage = Literal["val", "test"]


def results(metrics: Mapping[str, Tensor], *stages: Stage) -> dict[str, float]:
    """Return the results among a Trainer's ``callback_metrics``: those of the given stages, of forgetting and updates.

    >>> import torch
    >>> results(dict.fromkeys(["train_loss", "val_loss", "forgetting_kl"], torch.tensor(1.0)), "val")
    {'val_loss': 1.0, 'forgetting_kl': 1.0}
    """
    prefixes = (*(f"{stage}_" for stage in stages), "forgetting_", "update_")
    return {name: value.item() for name, value in metrics.items() if name.startswith(prefixes)}
