"""PEFT's shapes of the factors for each kind of layer, and limits of its layers."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from milora_lightning.adapters.convolution import READ_BY_MODELS, LoRAConv, by_group, grouped_product
from milora_lightning.adapters.experts import LoRAExperts, is_stack
from milora_lightning.adapters.factors import stack_factors
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import factor_shapes, groups_of, is_convolution
from milora_lightning.adapters.parts import first_few
from milora_lightning.adapters.weight_reads import read_weights
from milora_lightning.export.compression import compress
from milora_lightning.export.peft_attention import objection_to_attention
from milora_lightning.export.peft_experts import as_peft_sees, input_first, one_by_one, side_by_side
from milora_lightning.utils.errors import InvalidInputError


@torch.no_grad()
def update_factors(
    layer: LoRALinear, rank: int | None = None, correction: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, float, float]:
    """Write an adapter's update as two factors, of full or lower rank.

    Args:
        layer: The adapter.
        rank: The rank to compress to; the factors include the scale only if this makes them smaller.
        correction: Factors (out, m) and (m, in) of a correction that is added to ΔW.

    Returns:
        A (n, in) and B (out, n / groups), the rows of A sorted by group; the energy ‖·‖²_F that is lost, and that of
        ΔW. Both energies are 0 without ``rank``.
    """
    A, B = stack_factors(*layer.factors)
    if correction is not None:
        left, right = correction
        A, B = torch.cat([A, right], dim=-2), torch.cat([B, left / layer.scaling], dim=-1)
    if A.ndim == 3:  # experts, each by itself
        each = [_factors(layer, own_A, own_B, 1, rank) for own_A, own_B in zip(A, B, strict=True)]
        A, B = torch.stack([part[0] for part in each]), torch.stack([part[1] for part in each])
        return A, B, sum(part[2] for part in each), sum(part[3] for part in each)
    groups = groups_of(layer.base_layer)
    A = by_group(A, groups, layer.r).flatten(0, 1) if groups > 1 else A
    return _factors(layer, A, B, groups, rank)


def _factors(
    layer: LoRALinear, A: Tensor, B: Tensor, groups: int, rank: int | None
) -> tuple[Tensor, Tensor, float, float]:
    if rank is None:
        return A.detach(), B.detach(), 0.0, 0.0
    if rank >= len(A):
        delta = layer.scaling * grouped_product(A, B, groups, len(A))
        return A.detach(), B.detach(), 0.0, delta.double().square().sum().item()
    if rank % groups:
        raise InvalidInputError(
            f"rank={rank} cannot be shared among the {groups} groups of a convolution: choose a multiple of {groups}."
        )
    matrices = zip((layer.scaling * B).chunk(groups), A.chunk(groups), strict=True)
    each = [compress(own_B, own_A, rank // groups) for own_B, own_A in matrices]
    lost, energy = sum(part[2] for part in each), sum(part[3] for part in each)
    return torch.cat([part[0] for part in each]), torch.cat([part[1] for part in each]), lost, energy


def in_peft(layer: LoRALinear, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Convert factors to PEFT's layout: those of a convolution become filters that read all input channels.

    Args:
        layer: The adapter.
        A: Factor (n, in), its rows sorted by group.
        B: Factor (out, n / groups).
    """
    if isinstance(layer, LoRAExperts):
        A, B = as_peft_sees(layer, A, B)
        return side_by_side(A, B)
    if not isinstance(layer, LoRAConv):
        return A, B
    filters, groups = layer.as_weight(A), layer.groups
    whole = filters.new_zeros(len(A), groups, *filters.shape[1:])
    for group, (part, rows) in enumerate(zip(whole.chunk(groups), filters.chunk(groups), strict=True)):
        part[:, group] = rows
    return whole.flatten(1, 2), B.reshape(*B.shape, *[1] * len(layer.kernel_size))


def peft_shapes(layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return PEFT's shapes of the factors of a layer, given without its adapter."""
    of_A, of_B = factor_shapes(layer, r)
    if is_stack(layer):
        matrices, rows, columns = layer.weight.shape
        seen, made = (rows, columns) if input_first(layer) else (columns, rows)
        return (matrices * r, seen), (made, r * matrices)
    if not is_convolution(layer):
        return of_A, of_B
    return (r, layer.in_channels, *layer.kernel_size), (*of_B, *[1] * len(layer.kernel_size))


def from_peft(layer: LoRALinear, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Convert factors from PEFT's layout to A (r, in) and B (out, r / groups).

    Raises:
        ValueError: If a group's filters read input channels of other groups, as filters trained by PEFT do.
    """
    if isinstance(layer, LoRAExperts):
        return as_peft_sees(layer, *one_by_one(A, B, layer.matrices))
    if not isinstance(layer, LoRAConv):
        return A, B
    groups = layer.groups
    parts = A.reshape(len(A), groups, -1, *A.shape[2:]).chunk(groups)
    filters = torch.cat([part[:, group] for group, part in enumerate(parts)])
    if not math.isclose(filters.double().norm(), A.double().norm(), rel_tol=1e-9):
        raise InvalidInputError(
            f"it adapts a convolution of {groups} groups by filters that read all of its input, which is no change of "
            "the convolution's weight, and PEFT cannot merge it either"
        )
    return filters.flatten(1), B.flatten(1)


def as_written(tensors: Mapping[str, Tensor], embeddings: Collection[str]) -> dict[str, Tensor]:
    """Rename tensors as PEFT writes them, where factors of embeddings are parameters rather than layers.

    >>> list(as_written({"a.lora_A.weight": torch.ones(1), "b.lora_A.weight": torch.ones(1)}, ["a"]))
    ['a.lora_embedding_A', 'b.lora_A.weight']
    """

    def name(key: str) -> str:
        layer, _, factor = key.removesuffix(".weight").rpartition(".")
        return f"{layer}.{factor.replace('lora_', 'lora_embedding_')}" if layer in embeddings else key

    return {name(key): tensor for key, tensor in tensors.items()}


def as_read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`as_written`: name factors of embeddings like those of linear layers.

    >>> list(as_read({"a.lora_embedding_A": torch.ones(1)}))
    ['a.lora_A.weight']
    """
    return {re.sub(r"\.lora_embedding_([AB])$", r".lora_\1.weight", key): tensor for key, tensor in tensors.items()}


def objection_to_layers(model: nn.Module) -> str | None:
    """Return how PEFT's adapters of a model would compute something different from those here; None if they do not."""
    for parent in model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, LoRALinear) and (said := objection_to_attention(parent, name)):
                return said
            if isinstance(layer, LoRAExperts) and layer.matrices == 1:
                return "it takes a 3-D parameter with a single matrix for the weight of a layer"
            if isinstance(layer, LoRAConv) and (said := _objection_to(layer) or _unread(parent, name)):
                return said
    if read := list(read_weights(model)):
        return (
            f"the model reads the weight of {first_few(read)} in place of a call, and PEFT's adapter has no part in it"
        )
    return None


def _unread(parent: nn.Module, name: str) -> str | None:
    """Return a setting of a convolution that its parent's code reads, as in Whisper, and that PEFT's layers lack."""
    try:
        source = inspect.getsource(type(parent))
    except (OSError, TypeError):  # no source is available
        return None
    read = re.search(rf"self\.{re.escape(name)}\.({'|'.join(READ_BY_MODELS)})\b", source)
    return f"the model reads {name}.{read[1]}, which its adapters of convolutions do not have" if read else None


def _objection_to(layer: LoRAConv) -> str | None:
    if any(step != 1 for step in layer.dilation):
        return f"its adapters of convolutions have no dilation, and one of these has {layer.dilation}"
    if layer.padding_mode != "zeros":
        return f"its adapters of convolutions pad with zeros, and one of these has padding_mode={layer.padding_mode!r}"
    return None
