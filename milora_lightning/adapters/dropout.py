"""Dropout of an update's input: masks are drawn in forward and, on GPUs, redrawn identically in backward.

A stored mask takes a byte per entry of each layer's input: 7 GB for a 7B model and 8,192 tokens. Redrawing it costs a
GPU no time: one kernel draws and multiplies, instead of one that reads a mask and multiplies. On a CPU, redrawing would
take 6 % of a step, so masks are stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from milora_lightning.adapters.factors import Factors, stack_factors
from milora_lightning.utils.compat.torch import outside_transforms


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Set each entry of x to zero with probability ``p``, using torch's generator for x's device.

    Args:
        x: Any floating-point tensor.
        p: The probability, from 0 to below 1.

    Returns:
        x after dropout, and a mask of the same shape that is zero where an entry was dropped. Both still have to be
        scaled: see :func:`scales`.
    """
    if _draws_integers(x.device):
        mask, _ = draw_mask(x, p)
        return _masked(x, mask), mask
    return torch.native_dropout(_aligned(x), p, True)


def dropped_product(x: Tensor, factors: Factors, scaling: float, p: float) -> Tensor:
    """Compute s (B A drop(x) − B₀A₀ x) of shape (..., out), the update in PEFT's layer, which freezes W − s B₀A₀.

    This is the usual update of drop(x), plus s B₀A₀ (drop(x) − x), which is not zero when training starts.

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
    """Repeat an earlier :func:`drop`, from its mask or, if that is None, from the :func:`random_state` before it.

    Args:
        x: The same input (..., in).
        p: The same probability.
        mask: The mask that was returned, or None.
        state: The state of the device's generator before the first draw, or None if there is a mask.
    """
    if mask is not None:
        return _masked(x, mask) if _draws_integers(x.device) else _masked_scale(x, mask, scales(x.device, p)[0]), mask
    assert state is not None
    generator = _generator(x.device)
    before = generator.get_state()
    with outside_transforms():  # the first draw was outside of them
        generator.set_state(state)
        try:
            return drop(x, p)
        finally:
            generator.set_state(before)


def scales(device: torch.device, p: float) -> tuple[float, float]:
    """Return the scale that compensates for dropped entries, and its part that :func:`drop` leaves to its caller."""
    if _draws_integers(device):
        keep = 1 - _threshold(p) / 2**16
        return 1 / keep, 1 / keep
    return 1 / (1 - p), 1.0


def random_state(device: torch.device) -> Tensor | None:
    """Return the state of torch's generator for a device, or None if :func:`drop_again` needs the mask instead."""
    return None if _keeps_masks(device) else _generator(device).get_state()


def draw_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw a dropout mask with torch's generator for x's device.

    One 64-bit random integer decides for four entries. Drawing separately for each entry, as ``bernoulli_`` does, takes
    several times as long on CPUs. The probability is rounded to a multiple of 2⁻¹⁶.

    Args:
        x: Tensor to draw the mask for.
        p: Probability of dropping an entry, from 0 to below 1.

    Returns:
        A mask of 0 and 1 (uint8) in the shape of ``x``, and the exact probability of keeping an entry.
    """
    bits = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device)
    kept = bits.view(torch.int16)[: x.numel()] >= _threshold(p) - 2**15
    # A view costs nothing, but inductor of torch 2.10 has none of booleans; it fuses the conversion.
    kept = kept.to(torch.uint8) if torch.compiler.is_compiling() else kept.view(torch.uint8)
    return kept.view(x.shape), 1 - _threshold(p) / 2**16


def _draws_integers(device: torch.device) -> bool:
    """Whether masks on a device come from :func:`draw_mask` rather than from torch's dropout operation."""
    return device.type == "cpu"


def _threshold(p: float) -> int:
    return min(round(p * 2**16), 2**16 - 1)


def _aligned(x: Tensor) -> Tensor:
    """Return x at an aligned address: CUDA's dropout draws differently for unaligned tensors."""
    x = x.contiguous()
    return x if x.storage_offset() * x.element_size() % 16 == 0 else x.clone()


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask.to(x.dtype)  # converted first: CPUs multiply mixed dtypes slowly, element by element


def _masked_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    product: Tensor = torch.ops.aten.native_dropout_backward(x, mask.to(torch.bool), scale)
    return product


def _keeps_masks(device: torch.device) -> bool:
    """Whether masks are stored: on all devices but GPUs, and there while operations are recorded to be run later."""
    recorded = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    return recorded or device.type not in ("cuda", "meta")  # meta tensors, for counting, do what CUDA does


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
