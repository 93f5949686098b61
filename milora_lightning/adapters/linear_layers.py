"""Properties of layers that can have adapters: their kind, their shape, and whether they hold plain numbers.

Hugging Face's ``Conv1D`` is recognized without importing transformers: a model that contains one has imported it.
"""

from __future__ import annotations

import math
import re
import sys
from itertools import chain
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from milora_lightning.utils.compat.torch import ConvNd, is_hooked, own_convolution
from milora_lightning.utils.errors import InvalidInputError

PLAIN_LAYERS = (nn.Linear, NonDynamicallyQuantizableLinear)
PLAIN_TENSORS = (Tensor, nn.Parameter)
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_SCALES = re.compile(r"(weight|input|act|activation|output)_scales?(_inv)?|scales|scales?_inv|\w*zero_points?|q?zeros")
"""Attributes with a weight's scales in various quantizers. A layer with one of them holds codes of any dtype."""


def is_conv1d(module: object) -> bool:
    """Whether a module is transformers' ``Conv1D``, a linear layer whose weight is (in, out)."""
    layers = sys.modules.get("transformers.pytorch_utils")
    return layers is not None and isinstance(module, layers.Conv1D)


def is_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module is an instance of a linear layer or of a subclass.

    >>> is_linear(nn.Linear(2, 2)), is_linear(nn.Bilinear(2, 2, 2))
    (True, False)
    """
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_convolution(module: object) -> TypeGuard[ConvNd]:
    """Whether a module is a plain convolution in one to three dimensions, not transposed and without custom code.

    Subclasses that pad or normalize their weight compute a different function of it than torch's layers.

    >>> is_convolution(nn.Conv2d(2, 2, 3)), is_convolution(nn.ConvTranspose2d(2, 2, 3))
    (True, False)
    """
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and own_convolution(module)


def is_embedding(module: object) -> TypeGuard[nn.Embedding]:
    """Whether a module is an embedding that only looks up rows of its weight.

    >>> is_embedding(nn.Embedding(4, 2)), is_embedding(nn.Embedding(4, 2, max_norm=1.0))
    (True, False)
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return type(module).forward is nn.Embedding.forward


def is_adaptable(module: object) -> bool:
    """Whether a layer is of a kind that can have an adapter."""
    return is_linear(module) or is_convolution(module) or is_embedding(module)


def groups_of(layer: nn.Module) -> int:
    """Return the number of matrices in a layer's weight: one, or the number of groups of a convolution."""
    return layer.groups if is_convolution(layer) else 1


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a layer from its attributes, because a quantized weight has another shape.

    A convolution's weight (out, in / groups, *kernel) counts as a matrix whose columns are the entries of a filter.

    >>> linear_shape(nn.Conv2d(4, 6, 3, groups=2))
    (6, 18)
    """
    if is_convolution(layer):
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    if is_embedding(layer):
        return layer.embedding_dim, layer.num_embeddings
    if is_conv1d(layer):
        return cast(int, layer.nf), cast(int, layer.nx)
    return cast(int, layer.out_features), cast(int, layer.in_features)


def factor_shapes(layer: nn.Module, r: int, parts: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the stored factors, A (r, in) and B (out, r).

    In a grouped convolution, each group has r / groups rows of A, which are multiplied with its rows of B only. A fused
    projection has r rows of A for each part: (parts · r, in).

    A stack of experts has factors for each matrix: (experts, r, in) and (experts, out, r).

    Args:
        layer: The base layer.
        r: Rank of the factors.
        parts: Number of parts of a fused projection.
    """
    out_features, in_features = linear_shape(layer)
    of_A, of_B = (parts * r, in_features), (out_features, r // groups_of(layer))
    return (of_A, of_B) if (stacked := matrices_in(layer)) is None else ((stacked, *of_A), (stacked, *of_B))


def matrices_in(layer: object) -> int | None:
    """Return the number of matrices in a stack of experts' weights; None if the layer is not a stack.

    >>> matrices_in(nn.Linear(2, 2)) is None
    True
    """
    return getattr(layer, "matrices", None)


def largest_rank(layer: nn.Module) -> int:
    """Return the largest rank that a layer allows: its number of singular values, over all groups.

    >>> largest_rank(nn.Linear(8, 3)), largest_rank(nn.Conv2d(4, 6, 3, groups=2))
    (3, 6)
    """
    (out_features, in_features), groups = linear_shape(layer), groups_of(layer)
    return groups * min(out_features // groups, in_features)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds ordinary floating-point numbers: no 8-bit or integer codes, no tensor subclass.

    >>> is_plain(torch.zeros(2)), is_plain(torch.zeros(2, dtype=torch.float8_e4m3fn)), is_plain(torch.zeros(2).int())
    (True, False, False)
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return type(local) in PLAIN_TENSORS and local.dtype in PLAIN_DTYPES


def holds_its_weight(base: nn.Module) -> bool:
    """Whether a linear layer's ``weight`` is the matrix it multiplies by rather than codes for it.

    >>> holds_its_weight(nn.Linear(2, 2))
    True
    """
    return is_plain(cast(Tensor, base.weight)) and scale_name(base) is None


def scale_name(base: nn.Module) -> str | None:
    """Return the attribute name of the scales that a quantized layer holds alongside its codes, or None."""
    named = chain(base._parameters.items(), base._buffers.items())
    return next((name for name, tensor in named if tensor is not None and _SCALES.fullmatch(name)), None)


def is_plain_product(base: nn.Module) -> bool:
    """Whether calling a layer computes ``W x + bias`` with a plain, frozen W and bias, and does nothing else.

    Then the call may be replaced by the formula. This excludes subclasses, quantized layers, replaced ``forward``
    methods and layers with hooks.
    """
    kind = type(base)
    conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    if not (kind in PLAIN_LAYERS or conv1d) or "forward" in vars(base) or is_hooked(base):
        return False
    weight, bias = cast(Tensor, base.weight), cast("Tensor | None", base.bias)
    return is_plain(weight) and not weight.requires_grad and not (bias is not None and bias.requires_grad)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Convert an input to autocast's dtype where autocast is on, as torch does for ``nn.Linear``."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def output_of(base: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer, and check the shape of its output.

    Args:
        base: A layer that :func:`is_linear` recognizes.
        x: Input (..., in).

    Returns:
        The output (..., out).

    Raises:
        ValueError: If the output does not have this shape.
    """
    y: Tensor = base(x)
    expected = (*x.shape[:-1], linear_shape(base)[0])
    if not isinstance(y, Tensor) or y.shape != expected:
        got = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise InvalidInputError(
            f"A {type(base).__name__} turns inputs of shape {tuple(x.shape)} into {got}, not {expected}: it "
            "is more than a matrix product, and cannot have an adapter. Leave it out of target_modules."
        )
    return y
