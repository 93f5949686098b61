"""The operator of block-wise causal attention: within whole sequences, and within rows packed into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from milora_lightning.arrangement import BLOCK, Arrangement, Block, Packing, weight_count
from milora_lightning.operators import differentiate, operator


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, packing: Packing | None = None) -> Tensor:
    """Compute softmax(s q kᵀ + causal mask) v with grouped key-value heads, differentiably.

    The queries that share a key-value head are rows of one product, in place of copies of the keys and values, and
    the queries of a block meet only the keys up to the block's end: of whole blocks, because the softmax, taken in
    float32, is twice as fast over whole vectors. Whatever is behind a sequence's end, causality hides.

    Args:
        query: Queries (batch, heads, queries, head_dim), those of the last positions.
        key: Keys (batch, key-value heads, length, head_dim); heads are a multiple of key-value heads.
        value: Values, likewise.
        scaling: The factor s.
        packing: If given, the batch is one sequence of packed rows.

    Returns:
        The output (batch, queries, heads, head_dim).
    """
    options = packing or (0, 1, 0, None)
    output: Tensor = _attend_opaquely(query, key, value, scaling, *options)[0]
    return output


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, prefix: int, rows: int, length: int, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    packing = _packing(prefix, rows, length, slots)
    arrangement = Arrangement(query, key, packing)
    q, ks, vs = arrangement.arrange_queries(query), *map(arrangement.arrange_keys, (key * scaling, value))
    weights, output = query.new_empty(weight_count(query, key, packing)), torch.empty_like(q)
    triangle = query.new_full((BLOCK, BLOCK), -torch.inf).triu_(1).unsqueeze(1)  # the same for all heads of a group
    for block in arrangement.blocks:
        k, v, probabilities = _of_block(block, ks, vs, weights)
        scores = torch.bmm(_rows(q, block, k), k.mT)
        positions = block.positions.stop - block.positions.start
        last_block = scores.view(len(k), positions, -1, block.keys)[..., -BLOCK:]
        last_block += triangle[block.offset : block.offset + positions]
        torch.softmax(scores, -1, out=probabilities)
        torch.bmm(probabilities, v, out=_rows(output, block, k))
    return arrangement.restore_queries(output), weights


def _attend_shapes(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, prefix: int, rows: int, length: int, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    weights = query.new_empty(weight_count(query, key, _packing(prefix, rows, length, slots)))
    return _empty_like(query).transpose(1, 2), weights


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor | None,
    weights: Tensor,
    scaling: float,
    prefix: int,
    rows: int,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    arrangement = Arrangement(query, key, _packing(prefix, rows, length, slots))
    q, g = map(arrangement.arrange_queries, (query, grad.transpose(1, 2)))
    ks, vs = map(arrangement.arrange_keys, (key * scaling, value))
    grad_q, grad_ks, grad_vs = torch.empty_like(q), *([torch.empty_like(x) for x in xs] for xs in (ks, vs))
    for block in arrangement.blocks:
        k, v, probabilities = _of_block(block, ks, vs, weights)
        q_rows, g_rows = (_rows(x, block, k) for x in (q, g))
        grad_p = torch.bmm(g_rows, v.mT)
        grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype)
        torch.bmm(grad_s, k, out=_rows(grad_q, block, k))
        first = block.keys == ks[block.part].shape[1]  # which meets all keys; then there is nothing yet to add to
        for total, left, right in ((grad_ks, grad_s, q_rows), (grad_vs, probabilities, g_rows)):
            total[block.part][:, : block.keys].baddbmm_(left.mT, right, beta=0 if first else 1)
    grad_k, grad_v = (arrangement.sum_keys(x).transpose(1, 2) for x in (grad_ks, grad_vs))
    return arrangement.restore_queries(grad_q).transpose(1, 2), grad_k.mul_(scaling), grad_v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scaling, prefix, rows, length, slots = inputs
    ctx.save_for_backward(*tensors, slots, output[1])
    ctx.options = scaling, prefix, rows, length
    ctx.set_materialize_grads(False)  # those of the attention weights, which nobody else sees, would be large


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward_opaquely(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None)


_attend_opaquely = operator("causal_attention", _attend, _attend_shapes)
_backward_opaquely = operator(
    "causal_attention_backward", _backward, lambda grad, q, k, v, *_: tuple(_empty_like(x) for x in (q, k, v))
)
differentiate("causal_attention", _differentiate, _setup_context)


def _empty_like(x: Tensor) -> Tensor:
    """Memory for (batch, heads, length, head_dim) that holds the heads of a token together, as layers around it do."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _packing(prefix: int, rows: int, length: int, slots: Tensor | None) -> Packing | None:
    return None if slots is None else Packing(prefix, rows, length, slots)


def _of_block(
    block: Block, ks: Sequence[Tensor], vs: Sequence[Tensor], weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values that a block meets, and its attention weights (rows · key-value heads, queries, keys)."""
    k, v = (xs[block.part][:, : block.keys] for xs in (ks, vs))
    return k, v, weights[block.weights].view(len(k), -1, block.keys)


def _rows(x: Tensor, block: Block, k: Tensor) -> Tensor:
    """View a block's queries, units in order, as (rows · key-value heads, positions · group of heads, head_dim)."""
    return x[block.queries].view(len(k), -1, k.shape[2])
