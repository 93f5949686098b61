"""``nn.MultiheadAttention`` with adapters, which torch's code would bypass.

torch multiplies by ``in_proj_weight`` and ``out_proj.weight`` without calling a layer. With gradients, an
:class:`AdaptedAttention` calls its adapters instead, so that the update keeps its precision and its dropout, and no
gradient of a whole weight is computed; everything else uses the same operations as torch. In eval mode without
gradients, torch's code and its fast paths read W + ΔW instead of W, unless that sum would be less precise than the
factors. The fast path of ``nn.TransformerEncoderLayer`` does not call the attention and always reads the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.packed import PROJECTIONS, PackedWeight, adapter_of, projections
from milora_lightning.utils.derived_class import Derived, derive
from milora_lightning.utils.names import unwrapped_name


def _read(name: str) -> property:
    def weight(self: nn.Module) -> Tensor | None:
        adapter, frozen = adapter_of(self, name), self._parameters[f"{name}_weight"]
        # Between two calls, FSDP2 reads this as the parameter, which is sharded then.
        return frozen if adapter is None or isinstance(frozen, DTensor) else adapter.weight

    return property(weight, doc=f"The weight of ``{name}``, with the update of its adapter.")


class AdaptedAttention(Derived):
    """Mixin of attention modules whose projections have adapters."""

    @staticmethod
    def namespace(base: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
        """Return the properties that replace the parameters when they are read."""
        return {f"{name}_weight": _read(name) for name in PROJECTIONS}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what ``nn.MultiheadAttention`` does, with the adapters' updates."""
        attention = cast(nn.MultiheadAttention, self)
        adapters = [m for m in attention._modules.values() if isinstance(m, LoRALinear) and m.enabled]
        by_adapters = attention.training or torch.is_grad_enabled() or _sum_is_rounded(adapters, query)
        if not by_adapters or not adapters or query.is_nested:
            arguments = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            output: tuple[Tensor, Tensor | None] = super().forward(query, key, value, *arguments)  # type: ignore[misc]
            return output
        if is_causal and attn_mask is None:
            raise RuntimeError("nn.MultiheadAttention needs attn_mask where is_causal=True says that it is causal.")
        batched, first = query.dim() == 3, attention.batch_first
        inputs = (query, key, value)
        if batched:
            q, k, v = _projected(attention, *(_transposed(*inputs) if first else inputs))
        else:  # in three products, as by torch, even if the inputs are the same
            q, k, v = _projected(attention, *(x.unsqueeze(1) for x in inputs))
        mask = _additive(attn_mask, q.dtype)
        padding = _additive(key_padding_mask, q.dtype)
        if is_causal and padding is None and not need_weights:
            mask = None  # torch's attention knows it
        elif padding is not None:
            is_causal = False
            padding = padding if batched else padding.unsqueeze(0)
        _check_masks(attention, q.shape, k.shape, mask, padding)
        y, weights = _attend(attention, (q, k, v), mask, padding, need_weights, is_causal)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return (y.transpose(1, 0) if batched and first else y if batched else y.squeeze(1)), weights


def _sum_is_rounded(adapters: list[LoRALinear], x: Tensor) -> bool:
    """Whether W + ΔW would be less precise than ΔW, so that small updates would be lost."""
    narrow = any(layer.base_layer.weight.dtype.itemsize < layer.lora_A.dtype.itemsize for layer in adapters)
    return narrow or (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type))


def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Transpose batch and length. Identical inputs stay identical, so that they share one product."""
    q = query.transpose(1, 0)
    k = q if key is query else key.transpose(1, 0)
    return q, k, k if value is key else value.transpose(1, 0)


def _check_masks(
    attention: nn.MultiheadAttention,
    of_queries: torch.Size,
    of_keys: torch.Size,
    mask: Tensor | None,
    padding: Tensor | None,
) -> None:
    """Refuse masks of shapes that torch refuses, although they could be broadcast.

    Raises:
        RuntimeError: If there is one.
    """
    (targets, batch, _), sources = of_queries, of_keys[0]
    of_heads = (batch * attention.num_heads, targets, sources)
    if mask is not None and mask.shape not in ((targets, sources), of_heads):
        raise RuntimeError(
            f"attn_mask of nn.MultiheadAttention has the shape {tuple(mask.shape)}, not {(targets, sources)} or "
            f"{of_heads}."
        )
    if padding is not None and padding.shape != (batch, sources):
        raise RuntimeError(
            f"key_padding_mask of nn.MultiheadAttention has the shape {tuple(padding.shape)}, not {(batch, sources)} "
            "(batch, sources)."
        )


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a mask to one that is added to the attention logits."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _projected(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Compute query, key and value (length, batch, embed), in as many products as torch does."""
    packed = projections(attention)
    if "in_proj" not in packed:
        inputs = zip(PROJECTIONS[1:], (query, key, value), strict=True)
        return tuple(_product(attention, packed[name], x) for name, x in inputs)
    size = attention.embed_dim

    def part(x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        rows = slice(None) if last - first == 3 else slice(first * size, last * size)
        y = _product(attention, packed["in_proj"], x, rows)
        return y.view(*y.shape[:-1], last - first, size).movedim(-2, 0).contiguous().unbind()

    if key is not value:
        return (*part(query, 0, 1), *part(key, 1, 2), *part(value, 2, 3))
    return part(query, 0, 3) if query is key else (*part(query, 0, 1), *part(key, 1, 3))


def _product(attention: nn.Module, base: PackedWeight, x: Tensor, rows: slice = slice(None)) -> Tensor:
    adapter = adapter_of(attention, base.name)
    if adapter is not None:
        output: Tensor = adapter(x, rows)
        return output
    return F.linear(x, base.weight[rows], None if base.bias is None else base.bias[rows])


def _attend(
    attention: nn.MultiheadAttention,
    projected: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    padding: Tensor | None,
    need_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention and its output projection.

    Args:
        attention: Settings, extra keys and values, and the output projection.
        projected: Query, key and value (length, batch, embed).
        mask: Added to the logits; (targets, sources) or (batch · heads, targets, sources).
        padding: Added to the logits of each source; (batch, sources).
        need_weights: Whether to return the weights.
        is_causal: Whether to use torch's causal attention.

    Returns:
        The output (targets, batch, embed), and the weights (batch, heads, targets, sources), or None if they are not
        needed.
    """
    q, k, v = projected
    (targets, batch, size), heads, p = q.shape, attention.num_heads, attention.dropout if attention.training else 0.0
    mask = mask.unsqueeze(0) if mask is not None and mask.dim() == 2 else mask
    if attention.bias_k is not None and attention.bias_v is not None:
        k = torch.cat([k, attention.bias_k.repeat(1, batch, 1)])
        v = torch.cat([v, attention.bias_v.repeat(1, batch, 1)])
        mask, padding = (None if m is None else F.pad(m, (0, 1)) for m in (mask, padding))
    q, k, v = (x.reshape(len(x), batch * heads, size // heads).transpose(0, 1) for x in (q, k, v))
    if attention.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(batch * heads, 1, x.shape[2])], dim=1) for x in (k, v))
        mask, padding = (None if m is None else F.pad(m, (0, 1)) for m in (mask, padding))
    if padding is not None:
        of_sources = padding.view(batch, 1, 1, -1).expand(-1, heads, -1, -1).reshape(batch * heads, 1, -1)
        mask = of_sources if mask is None else mask + of_sources
    weights = None
    if need_weights:
        scaled = q * math.sqrt(1.0 / q.shape[2])
        logits = torch.bmm(scaled, k.mT) if mask is None else torch.baddbmm(mask, scaled, k.mT)
        weights = F.dropout(logits.softmax(dim=-1), p) if p else logits.softmax(dim=-1)
        y = torch.bmm(weights, v).transpose(0, 1).reshape(targets * batch, size)
        weights = weights.view(batch, heads, targets, -1)
    else:
        if mask is not None:
            mask = mask.unsqueeze(0) if len(mask) == 1 else mask.view(batch, heads, -1, k.shape[1])
        q, k, v = (x.view(batch, heads, -1, x.shape[2]) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal)
        y = y.permute(2, 0, 1, 3).contiguous().view(targets * batch, size)
    return attention.out_proj(y).view(targets, batch, size), weights


def packed_weights(module: nn.Module) -> dict[str, PackedWeight]:
    """Return the projections in a module that can have adapters but have none yet, by the adapters' names."""
    return {
        f"{unwrapped_name(name)}.{key}".lstrip("."): weight
        for name, child in module.named_modules()
        if is_attention(child)
        for key, weight in projections(child).items()
        if adapter_of(child, key) is None
    }


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an ``nn.MultiheadAttention``, with or without adapters, but not of a custom subclass."""
    if not isinstance(module, nn.MultiheadAttention):
        return False
    return isinstance(module, AdaptedAttention) or type(module).forward is nn.MultiheadAttention.forward


def adapt_attention(adapters: Mapping[PackedWeight, LoRALinear]) -> None:
    """Register adapters of projections as children of their attention modules, whose class is changed in place."""
    for base, adapter in adapters.items():
        base.holder._modules[base.name] = adapter
        derive(base.holder, AdaptedAttention)
