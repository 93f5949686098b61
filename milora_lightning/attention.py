"""Causal attention for training on CPUs, where torch's own kernels are slow at the lengths of fine-tuning."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "causal_blocks"
"""What ``attn_implementation`` calls it."""

BLOCK = 64  # queries that share their keys; keys after a block's last query are left out


def causal_blocks_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend causally, as an attention function of transformers.

    Plain causal attention over a whole sequence goes through :func:`causal_attention`; whatever else is asked for
    (a mask, one query against a cache, dropout, another device) through torch's scaled_dot_product_attention.

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
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return causal_attention(query, key, value, scaling).transpose(1, 2), None


@torch.library.custom_op("milora_lightning::causal_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, list[Tensor]]:
    q, k, v = _grouped(query, key, value)
    output = torch.empty_like(q)
    weights = []
    for start in range(0, q.shape[2], BLOCK):
        block = slice(start, min(start + BLOCK, q.shape[2]))
        keys = k[:, : block.stop]
        rows = q[:, :, block].flatten(1, 2)  # (batch · key-value heads, group · block, head_dim)
        scores = torch.bmm(rows * scaling, keys.mT).view(*q.shape[:2], -1, block.stop)
        scores += _triangle(scores)
        probabilities = scores.softmax(-1)
        output[:, :, block] = torch.bmm(probabilities.flatten(1, 2), v[:, : block.stop]).view_as(output[:, :, block])
        weights.append(probabilities)
    return output.view(query.shape), weights


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, list[Tensor]]:
    batch, heads, length, _ = query.shape
    groups = (batch * key.shape[1], heads // key.shape[1])
    edges = [*range(0, length, BLOCK), length]
    return query.new_empty(query.shape), [query.new_empty(*groups, b - a, b) for a, b in pairwise(edges)]


@torch.library.custom_op("milora_lightning::causal_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: list[Tensor], scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _grouped(query, key, value)
    g = grad.reshape(q.shape)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    start = 0
    for probabilities in weights:
        block = slice(start, start + probabilities.shape[2])
        start = block.stop
        keys, rows = k[:, : block.stop], q[:, :, block].flatten(1, 2)
        g_rows, p_rows = g[:, :, block].flatten(1, 2), probabilities.flatten(1, 2)
        grad_v[:, : block.stop].baddbmm_(p_rows.mT, g_rows)
        grad_p = torch.bmm(g_rows, v[:, : block.stop].mT).view_as(probabilities)
        grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype).flatten(1, 2)
        grad_q[:, :, block] = (torch.bmm(grad_s, keys) * scaling).view_as(grad_q[:, :, block])
        grad_k[:, : block.stop].baddbmm_(grad_s.mT, rows, alpha=scaling)
    return grad_q.view(query.shape), grad_k.view(key.shape), grad_v.view(value.shape)


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: list[Tensor], scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1])
    ctx.scaling = inputs[3]


def _differentiate(ctx: Any, grad: Tensor, _: list[Tensor]) -> tuple[Tensor | None, ...]:
    query, key, value, *weights = ctx.saved_tensors
    return (*_backward(grad, query, key, value, weights, ctx.scaling), None)


_attend.register_autograd(_differentiate, setup_context=_setup_context)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Compute softmax(s q kᵀ + causal mask) v with grouped key-value heads.

    The queries that share a key-value head are rows of one product, in place of copies of the keys and values, and
    the queries of a block meet only the keys that come before the block's end. The softmax is taken in float32.

    Args:
        query: Queries (batch, heads, length, head_dim).
        key: Keys (batch, key-value heads, length, head_dim); heads are a multiple of key-value heads.
        value: Values, likewise.
        scaling: The factor s.

    Returns:
        The output (batch, heads, length, head_dim).

    >>> q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    >>> reference = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    >>> torch.allclose(causal_attention(q, k, v, 4**-0.5), reference, atol=1e-6)
    True
    """
    return cast(Tensor, _attend(query, key, value, scaling)[0])


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring queries to (batch · key-value heads, group, length, head_dim), keys and values to (…, length, head_dim)."""
    batch, heads, length, width = query.shape
    shape = (batch * key.shape[1], length, width)
    q = query.reshape(shape[0], heads // key.shape[1], length, width)
    return q.contiguous(), key.reshape(shape).contiguous(), value.reshape(shape).contiguous()


def _triangle(scores: Tensor) -> Tensor:
    """The causal mask of the last queries of a sequence: −∞ where a key comes after the query."""
    queries, keys = scores.shape[-2:]
    return torch.full((queries, keys), -torch.inf, dtype=scores.dtype).triu_(keys - queries + 1)


AttentionInterface.register(NAME, causal_blocks_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
