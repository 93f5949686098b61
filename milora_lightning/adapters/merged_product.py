"""Merging for generation: a layer's weight and update are combined once, for many calls without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from milora_lightning.adapters.autograd import add_update, base_product, cast_stacks
from milora_lightning.adapters.factors import Factors, stack_factors


class MergedProduct:
    """The product with W + ΔW, without gradients. W itself is not written.

    In float32 the sum W + ΔW is stored as a new tensor. Where W or the product is less precise than the factors, the
    sum would round small updates away (in bfloat16, a third of the first ones). Then the stacked factors are stored in
    W's dtype, and the product is bit for bit that of :func:`milora_lightning.adapters.autograd.lora_linear`.

    Args:
        weight: Weight (out, in), or (in, out) if ``transposed``.
        factors: ``lora_A``, ``lora_B`` and their initial values, as :func:`stack_factors` takes them.
        scaling: The scale s.
        transposed: Whether the weight is a ``Conv1D``'s.
    """

    @torch.no_grad()
    def __init__(self, weight: Tensor, factors: Factors, scaling: float, transposed: bool) -> None:
        self.scaling, self.transposed = scaling, transposed
        self.dtype = weight.dtype
        self.weight = weight.detach()
        self.update: tuple[Tensor, Tensor] | None = None
        if weight.dtype == factors[0].dtype and _products_are_exact(weight.device):
            self.weight = merged_weight(weight, factors, scaling, transposed)
        else:
            self.update = cast_stacks(factors, weight.dtype)
        self._sources = weight, *factors  # kept alive, so that no other tensor can be given their memory
        self._versions = _versions(self._sources)

    def is_of(self, weight: Tensor, factors: Factors) -> bool:
        """Whether this was formed from these tensors and none has changed since.

        Changes through ``tensor.data``, of which torch keeps no record, are not noticed.
        """
        same = all(a is b for a, b in zip((weight, *factors), self._sources, strict=True))
        return same and _versions(self._sources) == self._versions

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute (W + ΔW) x + bias (..., out) for x (..., in) of W's dtype."""
        y = base_product(x, self.weight, bias, self.transposed)
        if self.update is not None:
            add_update(y, x.reshape(-1, x.shape[-1]), *self.update, self.scaling)
        return y


def can_merge(weight: Tensor, factors: Factors) -> bool:
    """Whether tensors are neither shards, of FSDP2 or (flat) FSDP1, nor inference tensors, which have no versions."""
    tensors = [t for t in (weight, *factors) if t is not None]
    return factors[0].ndim == 2 and not any(isinstance(t, DTensor) or t.is_inference() for t in tensors)


def merged_weight(weight: Tensor, factors: Factors, scaling: float, transposed: bool) -> Tensor:
    """Compute W + s (B A − B₀A₀) in the factors' dtype and the weight's layout; arguments as for the class."""
    A, B = stack_factors(*factors, scaling)
    weight = weight.to(A.dtype)
    return torch.addmm(weight, A.T, B.T) if transposed else torch.addmm(weight, B, A)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    return [None if t is None else (t.data_ptr(), t._version) for t in tensors]


def _products_are_exact(device: torch.device) -> bool:
    """Whether float32 products are computed in float32; TF32 and oneDNN's fast modes round their inputs."""
    backend = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)  # torch 2.9
    if precision is None:
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("none", "ieee")
