"""The layers that can have adapters: what counts as linear, how large it is, and whether its weight is plain numbers.

Hugging Face's ``Conv1D`` is recognized without importing transformers: a model that holds one has imported it.
"""

from __future__ import annotations

import re
import sys
from itertools import chain
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from milora_lightning.utils.compat import is_hooked
from milora_lightning.utils.errors import InvalidInputError

PLAIN_LAYERS = (nn.Linear, NonDynamicallyQuantizableLinear)
PLAIN_TENSORS = (Tensor, nn.Parameter)
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_SCALES = re.compile(r"(weight|input|act|activation|output)_scales?(_inv)?|scales|scales?_inv|\w*zero_points?|q?zeros")
"""Names that quantizers give to the scales of a weight. A layer that has one holds codes, whatever their dtype."""


def is_conv1d(module: object) -> bool:
    """Whether a module is transformers' ``Conv1D``, a linear layer whose weight is (in, out)."""
    layers = sys.modules.get("transformers.pytorch_utils")
    return layers is not None and isinstance(module, layers.Conv1D)


def is_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer, or of a class derived from one.

    >>> is_linear(nn.Linear(2, 2)), is_linear(nn.Bilinear(2, 2, 2))
    (True, False)
    """
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear layer, from its attributes: a quantized weight has another shape."""
    if is_conv1d(layer):
        return cast(int, layer.nf), cast(int, layer.nx)
    return cast(int, layer.out_features), cast(int, layer.in_features)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is ordinary floating-point numbers: not 8-bit or integer codes, nor a tensor subclass.

    >>> is_plain(torch.zeros(2)), is_plain(torch.zeros(2, dtype=torch.float8_e4m3fn)), is_plain(torch.zeros(2).int())
    (True, False, False)
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return type(local) in PLAIN_TENSORS and local.dtype in PLAIN_DTYPES


def holds_its_weight(base: nn.Module) -> bool:
    """Whether a linear layer's ``weight`` is the matrix it multiplies by, and not codes for it.

    >>> holds_its_weight(nn.Linear(2, 2))
    True
    """
    return is_plain(cast(Tensor, base.weight)) and scale_name(base) is None


def scale_name(base: nn.Module) -> str | None:
    """Return the name of the scales that a quantized layer holds next to its codes, or None."""
    named = chain(base._parameters.items(), base._buffers.items())
    return next((name for name, tensor in named if tensor is not None and _SCALES.fullmatch(name)), None)


def is_plain_product(base: nn.Module) -> bool:
    """Whether calling a layer computes ``W x + bias`` with a plain, frozen W and bias, and does nothing else.

    Then its code may be replaced by the formula. Not so for subclasses, quantized layers, replaced ``forward`` methods,
    and layers with hooks.
    """
    kind = type(base)
    conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    if not (kind in PLAIN_LAYERS or conv1d) or "forward" in vars(base) or is_hooked(base):
        return False
    weight, bias = cast(Tensor, base.weight), cast("Tensor | None", base.bias)
    return is_plain(weight) and not weight.requires_grad and not (bias is not None and bias.requires_grad)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Convert an input to autocast's dtype where autocast is on, as torch does for its own linear layer."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def output_of(base: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer whose code is its own.

    Args:
        base: A layer that :func:`is_linear` recognizes.
        x: Input (..., in).

    Returns:
        The output (..., out).

    Raises:
        ValueError: If the output has another shape.
    """
    y: Tensor = base(x)
    expected = (*x.shape[:-1], linear_shape(base)[0])
    if y.shape != expected:
        raise InvalidInputError(
            f"A {type(base).__name__} turns inputs of shape {tuple(x.shape)} into {tuple(y.shape)}, not {expected}: it "
            "is more than a matrix product, and cannot have an adapter. Leave it out of target_modules."
        )
    return y
