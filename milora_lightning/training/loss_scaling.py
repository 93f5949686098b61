"""A check of float16 runs: gradients vanish if the loss is not scaled."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from milora_lightning.utils.errors import InvalidInputError

_HALF = ("16-true", "transformer-engine-float16")
# Products and their gradients are in bfloat16, whatever the dtype of the weights.
_BFLOAT16 = ("bf16-mixed", "bf16-true")


def check_loss_scaling(trainer: Trainer, module: LightningModule, computes_in_float16: bool) -> None:
    """Refuse to train in float16 without loss scaling.

    The smallest float16 number is 6e-8, and some gradients of adapters with small initial factors are below it. Without
    scaling, some factors would train on gradients that are mostly zero, with no sign of it but a worse result.

    Args:
        trainer: The Trainer, whose precision plugin may scale the loss.
        module: The module; with manual optimization it may scale the loss itself.
        computes_in_float16: Whether the model computes in float16; the Trainer's precision may cause that, too.

    Raises:
        ValueError: If the run computes in float16 and nothing scales the loss.
    """
    plugin = trainer.precision_plugin
    scaled = getattr(plugin, "scaler", None) is not None or not module.automatic_optimization
    if scaled or plugin.precision in _BFLOAT16:
        return
    by_plugin = plugin.precision in _HALF or getattr(plugin, "dtype", None) is torch.float16
    if computes_in_float16 or by_plugin:
        what = f"{type(plugin).__name__} makes the model" if by_plugin else "The model is loaded to"
        raise InvalidInputError(
            f"{what} compute in float16, where small gradients become zero unless the loss is scaled, and with "
            f"precision {plugin.precision!r} it is not: set trainer.precision: 16-mixed, which scales it, or use "
            "bfloat16 or float32 (model.dtype)."
        )


def is_float16(module: nn.Module) -> bool:
    """Whether a module has parameters in float16, frozen ones too.

    >>> is_float16(nn.Linear(2, 2)), is_float16(nn.Linear(2, 2).half())
    (False, True)
    """
    return any(parameter.dtype == torch.float16 for parameter in module.parameters())
