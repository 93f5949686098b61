"""Tensor parallelism: each rank of a group computes a part of a linear layer, with or without an adapter.

``colwise``: each rank has some rows of W and B and all of A, and computes its features of the output from the whole
    input. ``rowwise``: each rank has some columns of W and A and all of B, and computes a partial sum of the output
    from its features of the input. ``replicate``: every rank has all weights and computes the whole output.

                      x (..., in)                          x (..., in / n)
       colwise   ┌────────┴────────┐         rowwise   ┌────────┴────────┐
            W (out / n, in)     A (r, in)         W (out, in / n)   A (r, in / n)
                 │       B (out / n, r)                │           B (out, r)
                 y (..., out / n)                      y (..., out), summed over the ranks
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from milora_lightning.adapters.autograd import base_product, lora_linear
from milora_lightning.adapters.dropout import drop
from milora_lightning.adapters.factors import Factors
from milora_lightning.adapters.linear_layers import in_autocast_dtype
from milora_lightning.parallel.collectives import sum_gradients, sum_parts

Style = Literal["colwise", "rowwise", "replicate"]

DIMS: dict[Style, dict[str, int]] = {
    "colwise": {"weight": 0, "bias": 0, "lora_B": 0, "initial_B": 0},
    "rowwise": {"weight": 1, "lora_A": 1, "initial_A": 1},
    "replicate": {},
}
"""The dimension along which each parameter is split; all others are replicated."""


@dataclass(frozen=True)
class Part:
    """Computes this rank's part of a layer.

    Args:
        style: How the layer is split.
        mesh: One-dimensional mesh of the ranks that share it.
    """

    style: Style
    mesh: DeviceMesh

    def __call__(self, x: Tensor, base: nn.Module, update: tuple[Factors, float, float] | None) -> Tensor:
        """Compute this rank's output.

        Args:
            x: Input (..., in), or this rank's features of it if the layer is split rowwise.
            base: The frozen linear layer.
            update: The adapter's factors, its scale and its dropout; None to leave the update out.

        Returns:
            The whole output (..., out), or this rank's features of it if the layer is split colwise.
        """
        x = in_autocast_dtype(x)
        group, summed = self.mesh.get_group(), self.style == "rowwise"
        weight, bias = local(cast(Tensor, base.weight)), cast("Tensor | None", base.bias)
        bias = None if bias is None else local(bias)
        own_bias = None if summed else bias  # a sum gets its bias once, not from each rank
        if self.style == "colwise":
            x = sum_gradients(x, group)
        if update is None:
            y = base_product(x, weight, own_bias, False)
        else:
            factors, scaling, dropout = update
            A, B, A0, B0 = (None if factor is None else local(factor) for factor in factors)
            A, B = cast(Tensor, A), cast(Tensor, B)
            if self.style == "colwise":
                A = sum_gradients(A, group)
            elif summed:
                B = sum_gradients(B, group)
            mask = self._own_mask(x, dropout) if summed and dropout else None
            y = lora_linear(x, weight, own_bias, A, B, A0, B0, scaling, dropout, mask=mask)
        if summed:
            y = sum_parts(y, group)
        return y if own_bias is bias or bias is None else y + bias.to(y.dtype)

    def _own_mask(self, x: Tensor, dropout: float) -> Tensor:
        """Draw the mask of the whole input, as the other ranks do, so that all features are dropped independently."""
        size, rank = self.mesh.size(), self.mesh.get_local_rank()
        _, mask = drop(x.new_ones(*x.shape[:-1], x.shape[-1] * size), dropout)
        return mask.chunk(size, dim=-1)[rank].contiguous()


def local(parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter; gradients flow back to the parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def split_linear(layer: nn.Module, part: Part) -> None:
    """Split a frozen linear layer without an adapter; its weights may be on the meta device.

    Args:
        layer: The layer; changed in place.
        part: This rank's part of it.
    """
    split_parameters(layer, part)
    layer.forward = partial(_without_update, layer, part)


def _without_update(layer: nn.Module, part: Part, x: Tensor) -> Tensor:
    return part(x, layer, None)


def split_parameters(module: nn.Module, part: Part) -> None:
    """Replace each parameter of a module, but not of its submodules, by this rank's part of it.

    Args:
        module: The module; changed in place.
        part: This rank's part of it.
    """
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        dim = DIMS[part.style].get(name)
        whole: Any = parameter.detach()
        placement: Placement = Replicate() if dim is None else Shard(dim)
        if dim is not None:
            whole = whole.chunk(part.mesh.size(), dim)[part.mesh.get_local_rank()].clone(
                memory_format=torch.contiguous_format
            )
        split = DTensor.from_local(
            whole, part.mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        module._parameters[name] = nn.Parameter(split, requires_grad=parameter.requires_grad)
