"""Dropout's masks: cheap to draw, and small to keep for backward."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw which entries a dropout of probability ``p`` keeps, from torch's generator of the device of x.

    Cuts 64 random bits into four decisions: a draw for each entry, as ``bernoulli_`` makes, takes several times as long
    on CPUs. The probability is rounded to a multiple of 2⁻¹⁶.

    Args:
        x: Tensor that the mask is for.
        p: Probability to drop an entry, from 0 to below 1.

    Returns:
        A mask of 0 and 1 (uint8) in the shape of ``x``, and the exact probability to keep an entry.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    bits = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device)
    kept = bits.view(torch.int16)[: x.numel()] >= dropped - 2**15
    return kept.view(torch.uint8).view(x.shape), 1 - dropped / 2**16


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set the entries of x that a mask drops to zero; their shapes may differ in how they are divided."""
    # Converted before the product: torch multiplies mixed types element by element.
    return x if mask is None else x * mask.view(x.shape).to(x.dtype)
