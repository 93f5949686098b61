"""Dtypes by name, and moving and casting tensors without losing precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dtype_of(name: torch.dtype | str) -> torch.dtype:
    """Return the dtype of a name, or the dtype itself.

    >>> dtype_of("bfloat16"), dtype_of(torch.float16)
    (torch.bfloat16, torch.float16)
    """
    found: torch.dtype = getattr(torch, name) if isinstance(name, str) else name
    return found


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype as options and configurations write it.

    >>> name_of_dtype(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def without_rounding(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that moves tensors as ``fn`` does, but does not cast them to a lower precision.

    For ``nn.Module._apply``, through which whole models are cast to half precision.

    >>> without_rounding(torch.Tensor.half)(torch.zeros(1)).dtype
    torch.float32
    """

    def move(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if result.dtype.itemsize < tensor.dtype.itemsize else result

    return move
