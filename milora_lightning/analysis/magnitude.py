"""The size of updates relative to their weights, computed from the factors without the full updates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from milora_lightning.adapters.convolution import by_group
from milora_lightning.adapters.factors import stack_factors
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import groups_of
from milora_lightning.adapters.quantization import decoded
from milora_lightning.linalg.devices import has_double
from milora_lightning.linalg.products import in_double
from milora_lightning.parallel.dtensor import full_tensor


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """Compute ‖B A‖_F from the traces of two small matrices, ‖B A‖² = tr(BᵀB AAᵀ), in float64.

    Args:
        B: Factors of shape (..., out, n).
        A: Factors of shape (..., n, in).

    Returns:
        The norm of each product, shape (...).

    >>> product_norm(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0, 0.0, 0.0]])).square().round()
    tensor(20., dtype=torch.float64)
    """
    B, A = in_double(B), in_double(A)
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp(min=0).sqrt()


@torch.no_grad()
def update_norms(layer: LoRALinear) -> Tensor:
    """Compute ‖ΔW‖_F of an adapter, shape (), or of each expert's, shape (experts,), in float64.

    Shards are gathered, so all ranks must call this.
    """
    A, B, *initial = layer.factors
    A0, B0 = (None if factor is None else full_tensor(factor) for factor in initial)
    A, B = stack_factors(full_tensor(A), full_tensor(B), A0, B0, layer.scaling)
    if (groups := groups_of(layer.base_layer)) == 1:
        return product_norm(B, A)
    each: Tensor = product_norm(B.view(groups, -1, B.shape[1]), by_group(A, groups, layer.r))
    return each.square().sum().sqrt()


@torch.no_grad()
def weight_norms(layer: LoRALinear) -> Tensor:
    """Compute ‖W‖_F of an adapter's weight, or of each expert's; shapes and ranks as for :func:`update_norms`."""
    base = layer.base_layer
    weight = layer.as_matrix(decoded(base, full_tensor(base.weight.detach())))
    dtype = torch.float64 if has_double(weight.device) else torch.float32
    return in_double(torch.linalg.vector_norm(weight, dim=(-2, -1), dtype=dtype))


def update_size(layers: Iterable[LoRALinear], norms: Iterable[Tensor]) -> Tensor:
    """Compute the mean of ‖ΔW‖_F / ‖W‖_F over the matrices of all layers, without weights that are zero.

    Args:
        layers: The adapters; at least one.
        norms: The result of :func:`weight_norms` for each adapter.

    Returns:
        The mean, a scalar in float64: 0 at the start, and larger the further the weights have moved.
    """
    pairs = [(update_norms(layer).flatten(), norm.flatten()) for layer, norm in zip(layers, norms, strict=True)]
    updates, weights = (
        torch.cat([each.to(pairs[0][0].device) for each in column]) for column in zip(*pairs, strict=True)
    )
    return (updates / weights)[weights > 0].mean()
