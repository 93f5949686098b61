"""What a processor computes fast."""

from __future__ import annotations

import platform

import torch

from milora_lightning.utils.compat import PRODUCTS_ON_X86
from milora_lightning.utils.messages import warn


def multiplies(dtype: torch.dtype) -> bool:
    """Tell whether this machine's processor has instructions for products in a dtype, as far as torch can tell.

    >>> multiplies(torch.float32)
    True
    """
    if dtype not in PRODUCTS_ON_X86 or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    questions = [getattr(torch.cpu, name, None) for name in PRODUCTS_ON_X86[dtype]]
    return None in questions or any(question() for question in questions if question is not None)


def warn_of_slow_products(dtype: torch.dtype) -> None:
    """Say it where training on the CPU in a dtype would take many times as long as in float32."""
    if not multiplies(dtype):
        name = str(dtype).removeprefix("torch.")
        warn(
            f"This processor has no instructions for products in {name}, in which a step takes many times as long as "
            "in float32: set model.dtype: float32 (--model.dtype float32) to train on this CPU."
        )
