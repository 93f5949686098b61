"""Causal attention for training on CPUs, where torch's own kernels are slow at the lengths of fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "causal_blocks"
"""What ``attn_implementation`` calls it."""

SHARED_PREFIX = "shared_prefix"
"""Option of the attention layers: (prefix, rows) of a batch that :mod:`milora_lightning.prefix` has laid out."""

BLOCK = 64  # queries that share their keys; keys after a block's last query are left out


def causal_blocks_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend causally, as an attention function of transformers.

    Plain causal attention over a whole sequence goes through :func:`causal_attention`, and so do rows that share a
    prefix; whatever else is asked for (a mask, one query against a cache, dropout, another device) through torch's
    scaled_dot_product_attention.

    Args:
        module: The attention layer.
        query: Queries (batch, heads, length, head_dim).
        key: Keys (batch, key-value heads, length, head_dim).
        value: Values, likewise.
        attention_mask: A mask, or None for plain causal attention.
        options: What transformers passes along.

    Returns:
        The output (batch, length, heads, head_dim), and None in place of the attention weights.

    Raises:
        ValueError: If the model caps its attention scores, which neither kernel does.
    """
    if options.get("softcap"):
        raise ValueError(f"attn_implementation={NAME!r} does not cap attention scores as this model does: use 'eager'.")
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    if options.get(SHARED_PREFIX) is not None:
        if options.get("dropout"):
            raise ValueError("Attention over rows that share a prefix has no dropout: set the model's to 0.")
        return _attend_rows(query, key, value, scaling, *options[SHARED_PREFIX]), None
    causal = options.get("is_causal")
    plain = (
        attention_mask is None
        and query.device.type == "cpu"
        and query.shape[2] == key.shape[2] > 1
        and query.shape[-1] == value.shape[-1]
        and not options.get("dropout")
        and (getattr(module, "is_causal", True) if causal is None else causal)
    )
    if not plain:
        return cast(
            "tuple[Tensor, None]",
            sdpa_attention_forward(module, query, key, value, attention_mask, **options),
        )
    return causal_attention(query, key, value, scaling).transpose(1, 2), None


def _attend_rows(query: Tensor, key: Tensor, value: Tensor, scaling: float, prefix: int, rows: int) -> Tensor:
    """Attend within each row and to the prefix that all rows share, of (1, heads, prefix + rows · length, head_dim).

    Returns:
        The output (1, prefix + rows · length, heads, head_dim).
    """

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        shared, own = x[:, :, :prefix], x[0, :, prefix:]
        return shared, own.reshape(own.shape[0], rows, -1, own.shape[2]).transpose(0, 1)  # (rows, heads, length, …)

    (q, own_q), (k, own_k), (v, own_v) = split(query), split(key), split(value)
    keys, values = (torch.cat([x.expand(rows, -1, -1, -1), own], 2) for x, own in ((k, own_k), (v, own_v)))
    of_prefix = causal_attention(q, k, v, scaling).transpose(1, 2)
    of_rows = causal_attention(own_q, keys, values, scaling).transpose(1, 2)
    return torch.cat([of_prefix, of_rows.flatten(0, 1).unsqueeze(0)], 1)


@torch.library.custom_op("milora_lightning::causal_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    q, k, v = _grouped(query, key, value)
    output = torch.empty_like(q)
    weights = query.new_empty(_weights(query, key))
    for block, keys, probabilities in _blocks(q, k, weights):
        rows = q[:, :, block].flatten(1, 2)  # (batch · key-value heads, group · block, head_dim)
        scores = torch.bmm(rows * scaling, k[:, keys].mT).view_as(probabilities)
        scores += _triangle(scores)
        torch.softmax(scores, -1, out=probabilities)
        output[:, :, block] = torch.bmm(probabilities.flatten(1, 2), v[:, keys]).view_as(output[:, :, block])
    return output.view(query.shape), weights


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(_weights(query, key))


@torch.library.custom_op("milora_lightning::causal_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _grouped(query, key, value)
    g = grad.reshape(q.shape)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for block, keys, probabilities in _blocks(q, k, weights):
        rows, g_rows, p_rows = (x.flatten(1, 2) for x in (q[:, :, block], g[:, :, block], probabilities))
        grad_v[:, keys].baddbmm_(p_rows.mT, g_rows)
        grad_p = torch.bmm(g_rows, v[:, keys].mT).view_as(probabilities)
        grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype).flatten(1, 2)
        grad_q[:, :, block] = (torch.bmm(grad_s, k[:, keys]) * scaling).view_as(grad_q[:, :, block])
        grad_k[:, keys].baddbmm_(grad_s.mT, rows, alpha=scaling)
    return grad_q.view(query.shape), grad_k.view(key.shape), grad_v.view(value.shape)


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.scaling = inputs[3]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.scaling), None)


_attend.register_autograd(_differentiate, setup_context=_setup_context)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Compute softmax(s q kᵀ + causal mask) v with grouped key-value heads.

    The queries that share a key-value head are rows of one product, in place of copies of the keys and values, and
    the queries of a block meet only the keys that come before the block's end. The softmax is taken in float32.

    Args:
        query: Queries (batch, heads, queries, head_dim), those of the last positions.
        key: Keys (batch, key-value heads, length, head_dim); heads are a multiple of key-value heads.
        value: Values, likewise.
        scaling: The factor s.

    Returns:
        The output (batch, heads, queries, head_dim).

    >>> q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    >>> reference = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    >>> torch.allclose(causal_attention(q, k, v, 4**-0.5), reference, atol=1e-6)
    True
    """
    return cast(Tensor, _attend(query, key, value, scaling)[0])


def _weights(query: Tensor, key: Tensor) -> int:
    """The number of attention weights that are computed: in closed form, as torch.compile needs it."""
    batch, heads, queries, length = *query.shape[:3], key.shape[2]
    whole = queries // BLOCK
    before = length - queries
    counted = BLOCK * whole * before + BLOCK * BLOCK * (whole * (whole + 1) // 2) + (queries - BLOCK * whole) * length
    return batch * heads * counted


def _blocks(q: Tensor, k: Tensor, weights: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cut the queries into blocks: yield the queries of each, the keys that they meet, and their weights."""
    groups, group, queries, length = *q.shape[:3], k.shape[1]
    start = taken = 0
    while start < queries:
        stop = min(start + BLOCK, queries)
        keys = length - queries + stop
        size = groups * group * (stop - start) * keys
        part = weights[taken : taken + size].view(groups, group, stop - start, keys)
        yield slice(start, stop), slice(0, keys), part
        start, taken = stop, taken + size


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring queries to (groups, group, queries, head_dim), keys and values to (groups, length, head_dim)."""
    batch, heads, queries, width = query.shape
    groups = batch * key.shape[1]
    q = query.reshape(groups, heads // key.shape[1], queries, width)
    k, v = (x.reshape(groups, x.shape[2], width).contiguous() for x in (key, value))
    return q.contiguous(), k, v


def _triangle(scores: Tensor) -> Tensor:
    """The causal mask of the last queries of a sequence: −∞ where a key comes after the query."""
    queries, keys = scores.shape[-2:]
    return torch.full((queries, keys), -torch.inf, dtype=scores.dtype).triu_(keys - queries + 1)


AttentionInterface.register(NAME, causal_blocks_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
