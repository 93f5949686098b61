"""Merging for generation: combine a layer's weight and update once, for many calls without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from milora_lightning.adapters.autograd import add_update, base_product, cast_stacks
from milora_lightning.adapters.factors import Factors, stack_factors
from milora_lightning.adapters.linear_layers import holds_its_weight
from milora_lightning.utils.errors import InvalidInputError


class Merged:
    """A result computed once from a weight and factors, valid as long as these do not change.

    Args:
        weight: The weight.
        factors: ``lora_A``, ``lora_B`` and their initial values, as :func:`stack_factors` takes them.
    """

    def __init__(self, weight: Tensor, factors: Factors) -> None:
        self._sources = weight, *factors  # kept alive, so that no other tensor can reuse their memory
        self._versions = _versions(self._sources)

    def is_of(self, weight: Tensor, factors: Factors) -> bool:
        """Whether this was computed from these tensors and none has changed since.

        Changes through ``tensor.data``, which torch does not record, are not noticed.
        """
        same = all(a is b for a, b in zip((weight, *factors), self._sources, strict=True))
        return same and _versions(self._sources) == self._versions


class MergedFactors(Merged):
    """The stacked factors of experts, scaled and in the weight's dtype, without gradients.

    Args:
        weight: The experts' weights.
        factors: As :class:`Merged` takes them.
        scaling: The scale s.
    """

    @torch.no_grad()
    def __init__(self, weight: Tensor, factors: Factors, scaling: float) -> None:
        super().__init__(weight, factors)
        self.stacks = stack_factors(*factors, scaling, weight.dtype)


class MergedProduct(Merged):
    """The product with W + ΔW, without gradients. W itself is not written.

    In float32 the sum W + ΔW is stored as a new tensor. If W or the product is less precise than the factors, the sum
    would round small updates away (in bfloat16, a third of the first ones). Then the stacked factors are stored in W's
    dtype instead, and the product equals bit for bit that of :func:`milora_lightning.adapters.autograd.lora_linear`.

    Args:
        weight: Weight (out, in), or (in, out) if ``transposed``.
        factors: ``lora_A``, ``lora_B`` and their initial values, as :func:`stack_factors` takes them.
        scaling: The scale s.
        transposed: Whether the weight is a ``Conv1D``'s.
        held: The parameters that the factors are computed from, if they are not parameters themselves.
    """

    @torch.no_grad()
    def __init__(
        self, weight: Tensor, factors: Factors, scaling: float, transposed: bool, held: Factors | None = None
    ) -> None:
        super().__init__(weight, held or factors)
        self.scaling, self.transposed = scaling, transposed
        self.dtype = weight.dtype
        self.weight = weight.detach()
        self.update: tuple[Tensor, Tensor] | None = None
        if weight.dtype == factors[0].dtype and _products_are_exact(weight.device):
            self.weight = merged_weight(weight, factors, scaling, transposed)
        else:
            self.update = cast_stacks(factors, weight.dtype)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute (W + ΔW) x + bias (..., out) for x (..., in) of W's dtype."""
        y = base_product(x, self.weight, bias, self.transposed)
        if self.update is not None:
            add_update(y, x.reshape(-1, x.shape[-1]), *self.update, self.scaling)
        return y


class MergeableLayer(nn.Module):
    """Base class of adapter layers: the weight W, its update ΔW and the sum W + ΔW, merged or not.

    Attributes:
        base_layer: The layer that is adapted.
        scaling: The scale s.
        transposed: Whether the weight is a ``Conv1D``'s.
        enabled: Whether the update is applied.
    """

    base_layer: nn.Linear
    scaling: float
    transposed: bool
    enabled: bool
    _merged: MergedProduct | None = None

    @property
    def factors(self) -> Factors:
        """A, B and their initial values A₀, B₀."""
        raise NotImplementedError

    @property
    def held_factors(self) -> Factors:
        """The parameters that the factors are computed from."""
        return self.factors

    def merge(self) -> None:
        """Compute W + ΔW once, instead of the update at each call. For generation, with its many small calls.

        Only calls without gradients use it; training, state dicts, exports and :func:`adapters_disabled` are not
        affected. The weight is not modified: the sum takes the memory of a second one. In half precision, where a sum
        would round the update, the stacked factors are cast once instead, and outputs stay the same bit for bit. When
        the factors or the weight change, the next call merges again. (Writes through ``tensor.data`` are not noticed:
        call this method again after them.)

        Does nothing for quantized weights and for shards, which FSDP gathers only during a call.
        """
        weight, held = self.base_layer.weight, self.held_factors
        self._merged = None
        if holds_its_weight(self.base_layer) and can_merge(weight, held):
            self._merged = MergedProduct(weight, self.factors, self.scaling, self.transposed, held)

    def unmerge(self) -> None:
        """Discard the result of :meth:`merge`."""
        self._merged = None

    @property
    def merged(self) -> bool:
        """Whether calls without gradients use the result of :meth:`merge`."""
        return self._merged is not None

    def merged_weight(self) -> Tensor:
        """Compute W + ΔW in float32 and round it once to W's dtype, in the base layer's layout.

        Raises:
            ValueError: If the base layer is quantized, as the sum would have to be quantized again.
        """
        if not holds_its_weight(self.base_layer):
            raise InvalidInputError(
                f"The weight of a {type(self.base_layer).__name__} is quantized and cannot be merged."
            )
        return self._sum_with_update().to(self.base_layer.weight.dtype)

    def _sum_with_update(self) -> Tensor:
        """Compute W + ΔW in the factors' precision, in the base layer's layout."""
        return merged_weight(self.base_layer.weight, self.factors, self.scaling, self.transposed)

    def delta_weight(self) -> Tensor:
        """Compute ΔW = s (B A − B₀A₀), of shape (out, in), in the factors' precision."""
        A, B = stack_factors(*self.factors, self.scaling)
        return B @ A

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a weight in the base layer's layout as a matrix (out, in)."""
        return weight.T if self.transposed else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out, in) in the base layer's layout."""
        return matrix.T if self.transposed else matrix

    @property
    def weight(self) -> Tensor:
        """The sum W + ΔW, in the base layer's layout and dtype.

        Lets modules that read ``layer.weight`` instead of calling the layer (``nn.MultiheadAttention``, the fast path
        of ``nn.TransformerEncoderLayer``) compute with the update and train it. In this use there is no dropout, and a
        half-precision weight rounds the update.
        """
        weight: Tensor = self.base_layer.weight
        return self.merged_weight() if self.enabled and holds_its_weight(self.base_layer) else weight

    def _usable_merged(self, x: Tensor) -> MergedProduct | None:
        """Return the result of :meth:`merge` if this call can use it, merging again if something has changed."""
        if torch.compiler.is_compiling() or self._merged is None or torch.is_grad_enabled():
            return None
        if not self._merged.is_of(self.base_layer.weight, self.held_factors):
            self.merge()
        return self._merged if self._merged is not None and self._merged.dtype == x.dtype else None  # not in autocast


def can_merge(weight: Tensor, factors: Factors) -> bool:
    """Whether tensors can be merged: not shards (of FSDP2 or FSDP1), nor inference tensors without versions."""
    tensors = [t for t in (weight, *factors) if t is not None]
    return factors[0].ndim > 1 and not any(isinstance(t, DTensor) or t.is_inference() for t in tensors)


def merged_weight(weight: Tensor, factors: Factors, scaling: float, transposed: bool) -> Tensor:
    """Compute W + s (B A − B₀A₀) in the factors' dtype and the weight's layout; without merging.

    Args:
        weight: Weight (out, in), or (in, out) if ``transposed``.
        factors: A, B and their initial values.
        scaling: The scale s.
        transposed: Whether the weight is a ``Conv1D``'s.
    """
    A, B = stack_factors(*factors, scaling)
    weight = weight.to(A.dtype)
    return torch.addmm(weight, A.T, B.T) if transposed else torch.addmm(weight, B, A)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    return [None if t is None else (t.data_ptr(), t._version) for t in tensors]


def _products_are_exact(device: torch.device) -> bool:
    """Whether float32 products are computed in float32; TF32 and oneDNN's fast modes round their inputs."""
    backend = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    return backend.matmul.fp32_precision in ("none", "ieee")
