"""LoRA+: a separate learning rate for B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.utils.errors import InvalidInputError

RATIO = "lr_ratio"
"""Key in an optimizer's parameter groups: the ratio of the group's learning rate to that of the first group."""


def make_optimizer(make: Callable[..., Optimizer], module: nn.Module, ratio: float | None) -> Optimizer:
    """Create the optimizer of a module; B may have a multiple of the learning rate (LoRA+, arXiv 2402.12354).

    Args:
        make: Creates an optimizer from parameters or parameter groups.
        module: The module.
        ratio: Ratio of B's learning rate to that of all others; None or 1 for one group with one rate.

    Returns:
        The optimizer; with a ratio, its second group holds B.

    Raises:
        ValueError: If the ratio is not positive, no B trains, or the optimizer accepts only one group.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if ratio in (None, 1):
        return make(trained)
    if not ratio > 0:
        raise InvalidInputError(f"loraplus_lr_ratio must be positive, not {ratio}.")
    factors = {layer.lora_B for layer in lora_layers(module).values() if layer.lora_B.requires_grad}
    if not factors:
        raise InvalidInputError(
            "loraplus_lr_ratio is the learning rate of the adapters' factor B over that of A, and no B trains here: "
            "leave it out."
        )
    groups: Sequence[Any] = [
        {"params": [p for p in trained if p not in factors], RATIO: 1.0},
        {"params": [p for p in trained if p in factors], RATIO: float(ratio)},
    ]
    try:
        optimizer = make(groups)
    except ValueError as error:
        raise InvalidInputError(f"loraplus_lr_ratio needs an optimizer that takes several groups: {error}.") from error
    if optimizer.param_groups[0]["lr"] is not None:
        set_rates(optimizer, optimizer.param_groups[0]["lr"])
    return optimizer


def set_rates(optimizer: Optimizer, rate: Any) -> None:
    """Set the learning rate of an optimizer; each group gets its multiple of it.

    >>> one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> groups = [{"params": one.parameters()}, {"params": other.parameters(), "lr_ratio": 4.0}]
    >>> from torch.optim import SGD
    >>> optimizer = SGD(groups, lr=0.1)
    >>> set_rates(optimizer, 0.2)
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.2, 0.8]
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATIO] if RATIO in group else rate
