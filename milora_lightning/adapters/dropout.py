"""Dropout of what an update sees of its input: drawn in forward, and on GPUs drawn again, the same, in backward.

A mask that is kept takes a byte for each entry of each layer's input: 7 GB for a 7B model and 8,192 tokens. To draw it
again takes a GPU no longer: one kernel draws and multiplies, in place of one that reads a mask and multiplies. On a
CPU, drawing it again takes 6 % of a step, so it is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from milora_lightning.adapters.factors import Factors, stack_factors
from milora_lightning.utils.compat.torch import outside_transforms


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
        mask, _ = draw_mask(x, p)
        return _masked(x, mask), mask
    return torch.native_dropout(_aligned(x), p, True)


def dropped_product(x: Tensor, factors: Factors, scaling: float, p: float) -> Tensor:
    """Compute s (B A drop(x) − B₀A₀ x) of shape (..., out), the update of PEFT's layer, where W − s B₀A₀ is frozen.

    It is the usual update of what is left of x, plus s B₀A₀ (drop(x) − x), which is not zero when training starts.

    Args:
        x: Input (..., in).
        factors: A, B, A₀ and B₀.
        scaling: The scale s.
        p: Probability with which an entry of x is dropped.
    """
    seen = drop(x, p)[0] * scales(x.device, p)[1]
    A, B = stack_factors(*factors, scaling, x.dtype)
    update = F.linear(F.linear(seen, A), B)
    _, _, initial_A, initial_B = factors
    if initial_A is None or initial_B is None:
        return update
    return update + F.linear(F.linear(seen - x, initial_A.to(x.dtype)), (scaling * initial_B).to(x.dtype))


def drop_again(x: Tensor, p: float, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what :func:`drop` has returned, from its mask or, where that is None, from :func:`random_state` before.

    Args:
        x: Input (..., in), as it was then.
        p: Probability with which an entry was dropped.
        mask: The mask that was returned, or None.
        state: The state of the device's generator before the first draw; None where there is a mask.
    """
    if mask is not None:
        return _masked(x, mask) if _draws_integers(x.device) else _masked_scale(x, mask, scales(x.device, p)[0]), mask
    assert state is not None
    generator = _generator(x.device)
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
    """Return the state of torch's generator of a device, or None if :func:`drop_again` is to be given the mask."""
    return None if _keeps_masks(device) else _generator(device).get_state()


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


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask.to(x.dtype)  # converted first: CPUs multiply mixed dtypes slowly, element by element


def _masked_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    product: Tensor = torch.ops.aten.native_dropout_backward(x, mask.to(torch.bool), scale)
    return product


def _keeps_masks(device: torch.device) -> bool:
    """Whether masks are kept: always but on GPUs, and there where operations are recorded, to be run later."""
    recorded = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    return recorded or device.type not in ("cuda", "meta")  # the latter to count what the former does


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
