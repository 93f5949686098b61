"""Moving and casting tensors without losing precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def without_rounding(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that moves tensors as ``fn`` does, but does not cast them to a lower precision.

    For ``nn.Module._apply``, through which whole models are cast to half precision.

    >>> import torch
    >>> without_rounding(torch.Tensor.half)(torch.zeros(1)).dtype
    torch.float32
    """

    def move(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if result.dtype.itemsize < tensor.dtype.itemsize else result

    return move
