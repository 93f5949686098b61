"""Dropout of what an update sees of its input: drawn in forward, and drawn again, the same, in backward.

A mask that is kept takes a byte for each entry of each layer's input: 7 GB for a 7B model and 8,192 tokens. To draw it
again takes a GPU no longer: one kernel draws and multiplies, in place of one that reads a mask and multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from milora_lightning.utils.compat import outside_transforms


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Set each entry of x to zero with probability ``p``, by torch's generator of the device of x.

    Args:
        x: Any floating-point tensor.
        p: The probability, from 0 to below 1.

    Returns:
        What is left of x, and a mask in its shape that is zero where an entry was dropped. :func:`scales` tells what
        both are to be multiplied by.
    """
    if _draws_integers(x.device):
        # In the dtype of x: torch multiplies mixed dtypes slowly on CPUs, element by element.
        mask = draw_mask(x, p)[0].to(x.dtype)
        return x * mask, mask
    return torch.native_dropout(_aligned(x), p, True)


def drop_again(x: Tensor, p: float, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what :func:`drop` has returned, from its mask or, where that is None, from :func:`random_state` before."""
    if mask is not None:
        return x * mask if _draws_integers(x.device) else _masked_scale(x, mask, scales(x.device, p)[0]), mask
    generator = _generator(x.device)
    assert generator is not None
    assert state is not None
    before = generator.get_state()
    with outside_transforms():  # in which the first draw was not
        generator.set_state(state)
        try:
            return drop(x, p)
        finally:
            generator.set_state(before)


def scales(device: torch.device, p: float) -> tuple[float, float]:
    """Return the scale that makes up for what is dropped, and which part of it :func:`drop` leaves to its caller."""
    if _draws_integers(device):
        keep = 1 - _threshold(p) / 2**16
        return 1 / keep, 1 / keep
    return 1 / (1 - p), 1.0


def random_state(device: torch.device) -> Tensor | None:
    """Return the state of torch's generator of a device, or None if :func:`drop_again` has to be given the mask.

    So it is where operations are recorded, in which a generator cannot be set back.
    """
    recorded = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    generator = None if recorded else _generator(device)
    return None if generator is None else generator.get_state()


def draw_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw which entries a dropout of probability ``p`` keeps, from torch's generator of the device of x.

    One 64-bit random integer decides for four entries. A draw for each entry, as in ``bernoulli_``, takes several times
    as long on CPUs. The probability is rounded to a multiple of 2⁻¹⁶.

    Args:
        x: Tensor that the mask is for.
        p: Probability to drop an entry, from 0 to below 1.

    Returns:
        A mask of 0 and 1 (uint8) in the shape of ``x``, and the exact probability to keep an entry.
    """
    bits = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device)
    kept = bits.view(torch.int16)[: x.numel()] >= _threshold(p) - 2**15
    return kept.view(torch.uint8).view(x.shape), 1 - _threshold(p) / 2**16


def _draws_integers(device: torch.device) -> bool:
    """Whether masks come from :func:`draw_mask` on a device, rather than from its own operation for dropout."""
    return device.type == "cpu"


def _threshold(p: float) -> int:
    return min(round(p * 2**16), 2**16 - 1)


def _aligned(x: Tensor) -> Tensor:
    """Return x where CUDA's dropout finds whole vectors: by its place in memory it would draw for other entries."""
    x = x.contiguous()
    return x if x.storage_offset() * x.element_size() % 16 == 0 else x.clone()


def _masked_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    product: Tensor = torch.ops.aten.native_dropout_backward(x, mask, scale)
    return product


def _generator(device: torch.device) -> torch.Generator | None:
    """Return torch's generator of a device, if it is known that its draws can be repeated there."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator if device.type in ("cpu", "meta") else None
