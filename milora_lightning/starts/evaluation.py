"""Computing a start for one weight, and checking the results of registered functions."""

from __future__ import annotations

import torch
from torch import Tensor

from milora_lightning.linalg.singular import SingularSlice
from milora_lightning.starts.methods import Pair
from milora_lightning.starts.registry import Start
from milora_lightning.starts.statistics import Statistics
from milora_lightning.utils.errors import InvalidInputError


@torch.no_grad()
def evaluate(
    start: Start,
    weight: Tensor,
    r: int,
    generator: torch.Generator | None = None,
    statistics: Statistics | None = None,
) -> SingularSlice | Pair:
    """Compute a start for a weight, in float32 on the weight's device, independently of the layer's scale.

    Args:
        start: The start.
        weight: Weight of shape (out, in).
        r: Rank of the factors.
        generator: CPU generator for the random choices.
        statistics: The layer's statistics, for starts that depend on data.

    Returns:
        A₀ (r, in) and B₀ (out, r), or triplets, whose part of the weight becomes s B₀A₀.

    Raises:
        ValueError: If the weight is not a finite matrix, r is out of range, or a registered function returns other
            shapes, values that are not finite, or something else than it was registered for.
    """
    W = weight.detach()
    if start.registered:  # a copy, as the weight itself must never be written
        W = W.to(torch.promote_types(W.dtype, torch.float32), copy=True)
    found = start.compute(W, r, statistics, generator)
    if start.registered and not (
        isinstance(found, tuple) and len(found) in (2, 3) and all(map(torch.is_tensor, found))
    ):
        raise InvalidInputError(
            f"the start {start.name!r} gives {type(found).__name__}, and not A₀ and B₀, or U, S and Vᵀ, as a tuple"
        )
    parts = [x.detach().to(weight.device, torch.float32).contiguous() for x in found]
    if start.registered:
        _check(start, parts, weight.shape, r)
    return SingularSlice(*parts) if len(parts) == 3 else (parts[0], parts[1])


def _check(start: Start, parts: list[Tensor], shape: torch.Size, r: int) -> None:
    """Refuse results of a registered function that an adapter cannot start from."""
    wanted = part_shapes(len(parts), shape, r)
    shapes = [tuple(x.shape) for x in parts]
    if shapes != wanted:
        raise InvalidInputError(
            f"the start {start.name!r} gives tensors of shapes {shapes}, and for r={r} A₀ has to be {(r, shape[1])} "
            f"and B₀ {(shape[0], r)}"
        )
    if not all(bool(x.isfinite().all()) for x in parts):
        raise InvalidInputError(f"the start {start.name!r} gives NaN or infinite entries")
    if len(parts) == 3 and bool((parts[1] < 0).any()):
        raise InvalidInputError(f"the start {start.name!r} gives negative singular values")
    if start.zero_product and all(bool(x.any()) for x in parts):
        raise InvalidInputError(
            f"the start {start.name!r} is registered with zero_product, and neither A₀ nor B₀ is zero: leave that out"
        )


def part_shapes(number: int, shape: torch.Size, r: int) -> list[tuple[int, ...]]:
    """Return the shapes of A₀ and B₀, or, if a start returns three tensors, of U, S and Vᵀ.

    Args:
        number: Number of tensors that a start returns, 2 or 3.
        shape: Shape of the weight (out, in).
        r: Rank of the factors.
    """
    out_features, in_features = shape
    return [(out_features, r), (r,), (r, in_features)] if number == 3 else [(r, in_features), (out_features, r)]
