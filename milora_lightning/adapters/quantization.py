"""Quantized weights: recognizing them, and decoding them to a matrix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from milora_lightning.adapters.linear_layers import PLAIN_TENSORS, holds_its_weight, is_plain, scale_name
from milora_lightning.utils.compat.torch import is_traceable_wrapper_subclass
from milora_lightning.utils.errors import InvalidInputError

BITSANDBYTES = ("Params4bit", "Int8Params")
"""Class names of bitsandbytes' weights; by name, because it may not be installed."""


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor consists of: itself, or those inside a tensor subclass (torchao's).

    >>> len(list(pieces(torch.zeros(2))))
    1
    """
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from pieces(getattr(tensor, name))
    else:
        yield tensor.detach()


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether a module is a quantizer's linear layer that is not an ``nn.Linear`` (GPTQ, AWQ, HQQ).

    >>> is_quantized_linear(nn.Linear(2, 2))
    False
    """
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    tensors = chain(module._parameters.values(), module._buffers.values())
    return (
        not isinstance(module, nn.Linear)
        and all(isinstance(size, int) for size in sizes)
        and any(t is not None and not t.is_floating_point() and not t.is_complex() for t in tensors)
    )


def keep_codes_in_place(module: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit codes when a model evaluates.

    On CPUs with AVX512-BF16 it would repack them for a product without a gradient, so that after the first evaluation
    no earlier layer would get a gradient.
    """
    for child in module.modules():
        if hasattr(child, "support_avx512bf16_for_cpu"):
            cast(Any, child).support_avx512bf16_for_cpu = False


def decoded(base: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight that a linear layer computes with, in the layer's layout.

    Understands plain floating-point weights, bitsandbytes (4 and 8 bit), transformers' ``FP8Linear`` (codes multiplied
    by the scales of their blocks), and tensor subclasses with a ``dequantize`` method (torchao, quanto).

    Args:
        base: The layer.
        weight: Its weight, not sharded.

    Returns:
        A floating-point matrix (out, in), or (in, out) in a ``Conv1D``.

    Raises:
        ValueError: If the weight is of another kind, whose codes cannot be interpreted.
    """
    if type(base.weight).__name__ in BITSANDBYTES:
        return _from_bitsandbytes(base)
    if holds_its_weight(base) or (_is_fp8_linear(base) and is_plain(weight)):  # some FP8Linear layers are not quantized
        return weight
    if (
        _is_fp8_linear(base)
        and type(weight) in PLAIN_TENSORS
        and weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    ):
        return _times_block_scales(weight, cast(Tensor, base.weight_scale_inv), cast(Any, base.block_size))
    if type(weight).dequantize is not Tensor.dequantize:
        dense = weight.dequantize()
        if is_plain(dense):
            return dense
    raise InvalidInputError(refusal(base))


def _from_bitsandbytes(base: nn.Module) -> Tensor:
    weight: Any = base.weight
    # 4-bit codes may be stored in a floating-point dtype.
    four_bits = type(weight).__name__ == "Params4bit"
    if weight.quant_state is None if four_bits else weight.dtype != torch.int8:  # not quantized yet
        return torch.Tensor(weight.data)
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes, if installed

    return cast(Tensor, dequantize_bnb_weight(weight, getattr(base, "state", None))).detach()


def _is_fp8_linear(base: nn.Module) -> bool:
    return any(c.__name__ == "FP8Linear" for c in type(base).__mro__) and hasattr(base, "weight_scale_inv")


def _times_block_scales(codes: Tensor, scales: Tensor, block_size: tuple[int, int] | None) -> Tensor:
    """Multiply each block of codes by its scale (rows and columns of blocks); the last blocks may be smaller.

    >>> _times_block_scales(torch.ones(2, 3), torch.tensor([[1.0, 2.0]]), (2, 2))
    tensor([[1., 1., 2.],
            [1., 1., 2.]])
    """
    scales = scales.detach().float()
    if block_size is not None:
        rows, columns = (-(-size // block) for size, block in zip(codes.shape, block_size, strict=True))
        if scales.shape != (rows, columns):
            raise InvalidInputError(
                f"its scales are {tuple(scales.shape)}, not one for each of {rows}×{columns} blocks."
            )
        scales = scales.repeat_interleave(block_size[0], 0)[: codes.shape[0]]
        scales = scales.repeat_interleave(block_size[1], 1)[:, : codes.shape[1]]
    return codes.detach().float() * scales


def refusal(base: nn.Module) -> str:
    """Return a message: why a layer's weight cannot be decoded, and what to do."""
    scales, weight = scale_name(base), cast(Tensor, base.weight)
    kind = f"{weight.dtype} codes" if type(weight) in (Tensor, nn.Parameter) else f"a {type(weight).__name__}"
    if scales is not None:
        kind += f" and {scales!r} beside it"
    return (
        f"its {type(base).__name__} holds {kind}, which cannot be turned back into a weight here; load the model "
        "unquantized (for FP8, with dequantize=True in its quantization_config), or quantized by bitsandbytes."
    )
