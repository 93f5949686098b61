"""Weights that hold several matrices: one per expert, group of a convolution, or part of a fused projection."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import groups_of, matrices_in
from milora_lightning.starts.methods import Pair

Compute = Callable[[Tensor, int, str, str, slice], Pair]
"""Computes the factors of a matrix (out, in) from the matrix, its rank, its name, a unique name, and its rows."""


def factors_by_matrix(name: str, layer: LoRALinear, weight: Tensor, compute: Compute) -> Pair:
    """Compute the factors of each matrix in a weight, and join them in the layout of the layer.

    Args:
        name: The layer's name.
        layer: The layer.
        weight: Its weight (out, in), or (experts, out, in) for a stack.
        compute: Computes the factors of one matrix. The matrices of a stack are called ``name[0]``, ``name[1]``, …;
            groups and parts have the name of their layer.

    Returns:
        ``lora_A`` and ``lora_B`` of the layer.
    """
    if matrices_in(layer) is None:
        return _by_group(name, layer, weight, compute)
    pairs = [_by_group(f"{name}[{index}]", layer, matrix, compute) for index, matrix in enumerate(weight)]
    return torch.stack([lora_A for lora_A, _ in pairs]), torch.stack([lora_B for _, lora_B in pairs])


def _by_group(name: str, layer: LoRALinear, weight: Tensor, compute: Compute) -> Pair:
    groups = groups_of(layer.base_layer)
    sizes = layer.parts or (len(weight) // groups,) * groups
    rows = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    pairs = [
        compute(weight[part], layer.r // groups, name, f"{name}:{i}" if i else name, part)
        for i, part in enumerate(rows)
    ]
    return torch.cat([lora_A for lora_A, _ in pairs]), torch.cat([lora_B for _, lora_B in pairs])
