"""Dropout's masks: cheap to draw, small to keep, and applied at memory speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def draw_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw which entries a dropout of probability ``p`` keeps.

    Cuts 64 random bits into four decisions, so that a mask costs a fraction of the product it goes into; a draw for
    each entry would cost more than that product. The probability is rounded to a multiple of 2⁻¹⁶.

    Args:
        x: Tensor that the mask is for.
        p: Probability to drop an entry.

    Returns:
        A mask of 0 and 1 (uint8) in the shape of ``x``, and the exact probability to keep an entry.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    bits = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device)
    decide = _decide_opaquely if _is_opaque(x) else _decide
    return decide(bits, x.numel(), dropped - 2**15).view(x.shape), 1 - dropped / 2**16


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set the entries of x that a mask drops to zero."""
    if mask is None:
        return x
    return (_mask_opaquely if _is_opaque(x) else _mask)(x, mask.view(x.shape))


def _decide(bits: Tensor, count: int, threshold: int) -> Tensor:
    return (bits.view(torch.int16)[:count] >= threshold).view(torch.uint8)


def _mask(x: Tensor, mask: Tensor) -> Tensor:
    # Converted before the product: torch multiplies mixed types element by element.
    return x * mask.to(x.dtype)


def _is_opaque(x: Tensor) -> bool:
    """Whether a compiler is not to look inside: on CPUs its loops over small integers go element by element."""
    return x.device.type == "cpu" and torch.compiler.is_compiling()


_decide_opaquely = torch.library.custom_op("milora_lightning::decide", _decide, mutates_args=())
_mask_opaquely = torch.library.custom_op("milora_lightning::mask", _mask, mutates_args=())


@_decide_opaquely.register_fake
def _(bits: Tensor, count: int, threshold: int) -> Tensor:
    return bits.new_empty(count, dtype=torch.uint8)


@_mask_opaquely.register_fake
def _(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep_mask(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (mask,) = ctx.saved_tensors
    return masked(grad, mask), None


_mask_opaquely.register_autograd(_differentiate, setup_context=_keep_mask)
