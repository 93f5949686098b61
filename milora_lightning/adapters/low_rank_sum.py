"""A sum of a matrix and a low-rank one, W + L R, that code written for W can multiply with, without computing the sum.

Modules multiply with the experts of a mixture in several ways: one expert after the other, gathered for each token, or
all in grouped products. A :class:`LowRankSum` can replace the stacked weights in each of these: x (W + L R) is computed
as x W + (x L) R, for the rows routed to each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from milora_lightning.adapters.dropout import drop, scales
from milora_lightning.utils.errors import InvalidInputError

_OF_THE_WEIGHT = {"shape", "dtype", "device", "ndim", "is_cuda", "layout", "size", "dim", "stride", "numel", "data_ptr"}
_OF_THE_WEIGHT |= {"is_floating_point", "is_contiguous", "element_size", "requires_grad", "is_meta", "is_sparse"}
_MULTIPLE = 8
"""Grouped products on GPUs need rows of a multiple of 16 bytes: 8 numbers in half precision."""


class LowRankSum:
    """W + L R as an operand of matrix products.

    Indexing its first dimension and transposing its last two give another :class:`LowRankSum`. Any other operation
    computes the sum first, with the memory that this takes.

    Args:
        weight: W, of shape (..., m, n); constant.
        left: L (..., m, k), differentiable, in the dtype of W.
        right: R (..., k, n), differentiable, in the dtype of W.
        dropout: Probability of dropping each entry of the input of L R, but not of W.

    >>> W, L, R, x = torch.randn(3, 4, 5), torch.randn(3, 4, 1), torch.randn(3, 1, 5), torch.randn(2, 5)
    >>> torch.allclose(F.linear(x, LowRankSum(W, L, R)[1]), x @ (W + L @ R)[1].T, atol=1e-5)
    True
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, dropout: float = 0.0) -> None:
        self.weight, self.left, self.right, self.dropout = weight, left, right, dropout
        self._each: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def dense(self) -> Tensor:
        """Compute the sum W + L R.

        Raises:
            ValueError: If there is dropout, which acts on the other operand.
        """
        if self.dropout:
            raise InvalidInputError(
                "These experts' code does more with their weights than matrix products, where lora_dropout has no "
                "place: set lora_dropout to 0 for this model, or leave the experts out (exclude_modules)."
            )
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight + self.left @ self.right

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point()):
            number = int(index)
            if self._each is None:  # indexing one by one would create a gradient of the whole stack each time
                self._each = self.left.unbind(), self.right.unbind()
            return self._like(self.weight[number], self._each[0][number], self._each[1][number])
        leading = isinstance(index, (slice, list)) or (isinstance(index, Tensor) and index.ndim == 1)
        if leading and self.weight.ndim > 2:
            return self._like(self.weight[index], self.left[index], self.right[index])
        return self.dense()[index]

    def __len__(self) -> int:
        return len(self.weight)

    def __iter__(self) -> Iterable[Any]:
        return (self[index] for index in range(len(self)))

    def transpose(self, one: int, other: int) -> Any:
        """Exchange two dimensions."""
        last = self.weight.ndim - 1
        if {one % self.weight.ndim, other % self.weight.ndim} == {last - 1, last}:
            return self._like(self.weight.mT, self.right.mT, self.left.mT)
        return self.dense().transpose(one, other)

    @property
    def mT(self) -> Any:  # noqa: N802
        """The transpose of each matrix."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:  # noqa: N802
        """The transpose of a single matrix."""
        return self.transpose(-2, -1) if self.weight.ndim == 2 else self.dense().T

    def t(self) -> Any:
        """Return the transpose of a single matrix."""
        return self.T

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Convert all parts to another dtype or device."""
        return self._like(*(part.to(*args, **kwargs) for part in (self.weight, self.left, self.right)))

    def contiguous(self, *_: Any, **__: Any) -> Any:
        """Return itself: products take any layout."""
        return self

    def __matmul__(self, x: Tensor) -> Tensor:
        return (self.weight @ x).add_(self.left @ (self.right @ self._seen(x)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.weight if name in _OF_THE_WEIGHT else self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).partition(".")[0]
        product = _PRODUCTS.get(name)
        if product is not None and len(args) >= 2:
            x, operand = args[:2]
            if isinstance(operand, LowRankSum) and not isinstance(x, LowRankSum):
                return product(func, x, operand, *args[2:], **kwargs)
            if isinstance(x, LowRankSum) and not isinstance(operand, LowRankSum) and product is _times and not args[2:]:
                return x @ operand
        return func(*_formed(args), **_formed(dict(kwargs)))

    def _like(self, weight: Tensor, left: Tensor, right: Tensor) -> LowRankSum:
        return LowRankSum(weight, left, right, self.dropout)

    def _seen(self, x: Tensor) -> Tensor:
        """Return the input of L R, after dropout."""
        return drop(x, self.dropout)[0] * scales(x.device, self.dropout)[1] if self.dropout else x


def _formed(value: Any) -> Any:
    """Replace each LowRankSum in a function's arguments by the computed sum."""
    if isinstance(value, LowRankSum):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_formed, value))
    return {key: _formed(each) for key, each in value.items()} if isinstance(value, dict) else value


def _times(func: Callable[..., Tensor], x: Tensor, operand: LowRankSum) -> Tensor:
    """Compute x (W + L R)."""
    return func(x, operand.weight).add_(func(func(operand._seen(x), operand.left), operand.right))


def _linear(func: Callable[..., Tensor], x: Tensor, operand: LowRankSum, bias: Tensor | None = None) -> Tensor:
    """Compute x (W + L R)ᵀ + bias."""
    return func(x, operand.weight, bias).add_(F.linear(F.linear(operand._seen(x), operand.right), operand.left))


def _grouped(func: Callable[..., Tensor], x: Tensor, operand: LowRankSum, *args: Any, **kwargs: Any) -> Tensor:
    """Compute x (W + L R) for groups of rows, each with one matrix."""
    if args or any(value is not None for key, value in kwargs.items() if key != "offs"):
        return func(x, operand.dense(), *args, **kwargs)
    left, right = operand.left, operand.right
    if missing := -left.shape[-1] % _MULTIPLE:
        left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    update = func(func(operand._seen(x), left, **kwargs), right, **kwargs)
    return func(x, operand.weight, **kwargs).add_(update)


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm"), _times),
    "linear": _linear,
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
}
"""The supported products, by the names of torch's functions and of transformers' replacements for them."""
