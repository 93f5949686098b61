"""Dropout's masks: cheap to draw, small to keep, and applied at memory speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from milora_lightning.operators import compiling_for_cpu, differentiate, operator, transformed

BITS = 2**17  # how many times 64 bits are drawn at once: few enough to be compared while they are in the cache


def draw_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw which entries a dropout of probability ``p`` keeps.

    Cuts 64 random bits into four decisions, so that a mask costs a fraction of the product it goes into; a draw for
    each entry would cost more than that product. The probability is rounded to a multiple of 2⁻¹⁶. On CPUs the bits
    come from numpy, whose generator is twice as fast, with a seed from torch's; elsewhere from torch's.

    Args:
        x: Tensor that the mask is for.
        p: Probability to drop an entry.

    Returns:
        A mask of 0 and 1 (uint8) in the shape of ``x``, and the exact probability to keep an entry.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    if transformed():  # each sample of a vmap may have draws of its own
        kept = (torch.rand_like(x, dtype=torch.float32) >= dropped / 2**16).to(torch.uint8)
    elif x.device.type == "cpu":
        draw = _draw_opaquely if compiling_for_cpu(x) else _draw
        kept = draw(torch.randint(2**63 - 1, ()), x.numel(), dropped)
    else:
        bits = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device)
        kept = (bits.view(torch.int16)[: x.numel()] >= _threshold(dropped)).view(torch.uint8)
    return kept.view(x.shape), 1 - dropped / 2**16


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set the entries of x that a mask drops to zero."""
    if mask is None:
        return x
    return (_mask_opaquely if compiling_for_cpu(x) else _mask)(x, mask.view(x.shape))


def _draw(seed: Tensor, count: int, dropped: int) -> Tensor:
    generator = np.random.SFC64(int(seed))
    kept = np.empty(count, dtype=np.bool_)
    for start in range(0, count, 4 * BITS):
        part = kept[start : start + 4 * BITS]
        bits = generator.random_raw((len(part) + 3) // 4)
        np.greater_equal(bits.view(np.int16)[: len(part)], _threshold(dropped), out=part)
    return torch.from_numpy(kept.view(np.uint8))


def _threshold(dropped: int) -> int:
    """The integer of 16 bits and a sign under which there are so many others."""
    return dropped - 2**15


def _mask(x: Tensor, mask: Tensor) -> Tensor:
    # Converted before the product: torch multiplies mixed types element by element.
    return x * mask.to(x.dtype)


_draw_opaquely = operator("draw", _draw, lambda seed, count, dropped: seed.new_empty(count, dtype=torch.uint8))
_mask_opaquely = operator("mask", _mask, lambda x, mask: x.new_empty(x.shape))


def _keep_mask(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (mask,) = ctx.saved_tensors
    return masked(grad, mask), None


differentiate("mask", _differentiate, _keep_mask)
