"""Block-wise causal attention for training on CPUs, where torch's kernels are slow at fine-tuning lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from milora_lightning.utils.compat.torch import softmax_backward
from milora_lightning.utils.errors import InvalidInputError

NAME = "causal_blocks"
"""Value of ``attn_implementation`` that selects it."""

UNSUPPORTED = {"softcap": "cap attention scores", "s_aux": "add attention sinks", "sinks": "add attention sinks"}
"""Options of transformers that change the attention weights, with a description of each."""

BLOCK = 64  # positions per block; all queries of a block use the keys up to the end of the block


def causal_blocks_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention function for transformers' ``AttentionInterface``.

    Plain causal attention over a whole sequence is computed block by block. Everything else (a mask, one query
    against a cache, dropout, another device) goes to torch's ``scaled_dot_product_attention``.

    Args:
        module: The attention layer.
        query: Queries (batch, heads, length, head_dim).
        key: Keys (batch, key-value heads, length, head_dim).
        value: Values, same shape as the keys.
        attention_mask: A mask, or None for plain causal attention.
        options: Further keyword arguments of transformers.

    Returns:
        The output (batch, length, heads, head_dim), and None in place of the attention weights.

    Raises:
        ValueError: If the model caps its attention scores or has sinks, which neither kernel supports.
    """
    for option, what in UNSUPPORTED.items():
        if options.get(option) is not None:
            raise InvalidInputError(f"attn_implementation={NAME!r} does not {what} as this model does: use 'eager'.")
    causal = options.get("is_causal")
    plain = (
        attention_mask is None
        and options.get("position_bias") is None
        and query.device.type == "cpu"
        and key.shape[2] >= query.shape[2] > 1
        and query.shape[-1] == value.shape[-1]
        and query.dtype == key.dtype == value.dtype  # rotary embeddings may have made some of them float32
        and (not torch.is_autocast_enabled("cpu") or query.dtype == torch.get_autocast_dtype("cpu"))
        and not options.get("dropout")
        and (getattr(module, "is_causal", True) if causal is None else causal)
    )
    if not plain:
        return cast(
            "tuple[Tensor, None]",
            sdpa_attention_forward(module, query, key, value, attention_mask, **options),
        )
    # Without a mask, the first keys belong to the positions of the queries, and all later keys are hidden. There are
    # later keys in a preallocated cache, and where gradient checkpointing appends the same keys to a cache twice.
    key, value = (x[:, :, : query.shape[2]] for x in (key, value))
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return causal_attention(query, key, value, scaling).transpose(1, 2), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Compute softmax(s q kᵀ + causal mask) v with grouped key-value heads, skipping most of the masked weights.

    The queries that share a key-value head are the rows of one matrix product, so keys and values are not copied.
    Queries are multiplied only with the keys up to the end of their block. Keys are padded to whole blocks because
    the softmax, taken in float32, is twice as fast over whole vectors; the causal mask hides the padding.

    Args:
        query: Queries (batch, heads, queries, head_dim) of the last positions.
        key: Keys (batch, key-value heads, length, head_dim); heads are a multiple of key-value heads.
        value: Values, same shape as the keys.
        scaling: The factor s.

    Returns:
        The output (batch, heads, queries, head_dim).

    >>> q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    >>> reference = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    >>> torch.allclose(causal_attention(q, k, v, 4**-0.5), reference, atol=1e-6)
    True
    """
    output: Tensor = _attend_opaquely(query, key, value, scaling)[0]
    return output


class _Block(NamedTuple):
    queries: slice  # among the queries of a key-value head, in order of position
    offset: int  # place of the first of their positions in the block
    keys: int  # number of keys they attend to
    weights: Tensor  # their attention weights (batch · key-value heads, queries, keys)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    q, (k, v) = _group_queries(query, key), (_pad_to_blocks(x) for x in (key * scaling, value))
    output, weights = torch.empty_like(q), query.new_empty(_weight_count(query, key))
    triangle = q.new_full((BLOCK, BLOCK), -torch.inf).triu_(1).unsqueeze(1)  # the same for all heads of a group
    for block in _blocks(query, key, weights):
        scores = torch.bmm(q[:, block.queries], k[:, : block.keys].mT)
        last_block = scores.view(len(k), -1, query.shape[1] // key.shape[1], block.keys)[..., -BLOCK:]
        last_block += triangle[block.offset : block.offset + last_block.shape[1]]
        torch.softmax(scores, -1, out=block.weights)
        torch.bmm(block.weights, v[:, : block.keys], out=output[:, block.queries])
    return _split_heads(output, query), weights


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, g = (_group_queries(x, key) for x in (query, grad))
    k, v = (_pad_to_blocks(x) for x in (key * scaling, value))
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    for block in _blocks(query, key, weights):
        g_rows, visible = g[:, block.queries], slice(block.keys)
        grad_p = torch.bmm(g_rows, v[:, visible].mT)
        grad_s = softmax_backward(grad_p, block.weights, -1, grad_p.dtype)
        torch.bmm(grad_s, k[:, visible], out=grad_q[:, block.queries])
        beta = 0 if block.keys == k.shape[1] else 1  # the first block sees all keys and initializes their gradients
        grad_k[:, visible].baddbmm_(grad_s.mT, q[:, block.queries], beta=beta)
        grad_v[:, visible].baddbmm_(block.weights.mT, g_rows, beta=beta)
    return _split_heads(grad_q, query), _split_heads(grad_k, key).mul_(scaling), _split_heads(grad_v, value)


def _blocks(query: Tensor, key: Tensor, weights: Tensor) -> Iterator[_Block]:
    """Cut the queries into blocks, starting with the last block, which attends to all keys."""
    batch, heads, stop = query.shape[:3]
    groups, length = batch * key.shape[1], key.shape[2]
    cached, group_size, taken = length - stop, heads // key.shape[1], 0
    for keys in range(-(-length // BLOCK) * BLOCK, cached // BLOCK * BLOCK, -BLOCK):
        start = max(keys - BLOCK - cached, 0)
        size = batch * heads * (stop - start) * keys
        block_weights = weights[taken : taken + size].view(groups, -1, keys)
        queries = slice(start * group_size, stop * group_size)
        yield _Block(queries, (cached + start) % BLOCK, keys, block_weights)
        stop, taken = start, taken + size


def _weight_count(query: Tensor, key: Tensor) -> int:
    """Count the attention weights of all blocks, in closed form because torch.compile needs it."""
    batch, heads, queries = query.shape[:3]

    def up_to(positions: int) -> int:
        """Count the weights of the first positions: each has one for every key up to the end of its block."""
        whole, rest = positions // BLOCK, positions % BLOCK
        return BLOCK * BLOCK * (whole * (whole + 1) // 2) + rest * BLOCK * (whole + 1)

    return batch * heads * (up_to(key.shape[2]) - up_to(key.shape[2] - queries))


def _group_queries(x: Tensor, key: Tensor) -> Tensor:
    """Reshape queries to (batch · key-value heads, queries · heads per group, head_dim), in order of position."""
    tokens = x.transpose(1, 2)
    by_group = tokens.reshape(*tokens.shape[:2], key.shape[1], -1).transpose(1, 2)
    return by_group.reshape(len(key) * key.shape[1], -1, x.shape[3]).contiguous()


def _pad_to_blocks(x: Tensor) -> Tensor:
    """Reshape keys or values to (batch · key-value heads, length, head_dim), zero-padded to whole blocks."""
    batch, heads, length, width = x.shape
    padded = x.new_empty(batch, heads, -(-length // BLOCK) * BLOCK, width)
    padded[:, :, :length] = x
    padded[:, :, length:] = 0
    return padded.flatten(0, 1)


def _split_heads(rows: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_group_queries` or :func:`_pad_to_blocks`: return (batch, heads, length, head_dim)."""
    batch, heads, length, width = like.shape
    groups = len(rows) // batch
    by_group = rows.view(batch, groups, -1, heads // groups * width)[:, :, :length]
    return by_group.transpose(1, 2).contiguous().view(batch, length, heads, width).transpose(1, 2)


def _empty_like(x: Tensor) -> Tensor:
    """Allocate (batch, heads, length, head_dim) with the heads of a token contiguous, as the layers around have it."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.scaling = inputs[3]
    ctx.set_materialize_grads(False)  # the zero gradient of the attention weights, which nobody uses, would be large


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, weights = ctx.saved_tensors
    if torch.is_grad_enabled():  # for double backward; the backward operator itself cannot be differentiated
        return (*_differentiable_backward(grad, query, key, value, ctx.scaling), None)
    return (*_backward_opaquely(grad, query, key, value, weights, ctx.scaling), None)


def _differentiable_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients over all keys at once, in operations that autograd can differentiate."""
    q, g = (x.reshape(len(key), key.shape[1], -1, *x.shape[2:]) for x in (query, grad))
    k, v = key.unsqueeze(2), value.unsqueeze(2)  # broadcast over the heads of a group
    queries, keys = query.shape[2], key.shape[2]
    later = torch.ones(queries, keys, dtype=torch.bool, device=key.device).triu(keys - queries + 1)
    p = (scaling * q @ k.mT).masked_fill(later, -torch.inf).softmax(-1)
    grad_p = g @ v.mT
    grad_s = scaling * p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    return (grad_s @ k).reshape(query.shape), (grad_s.mT @ q).sum(2), (p.mT @ g).sum(2)


# Custom operators, which torch.compile calls without tracing into them.
_attend_opaquely = torch.library.custom_op("milora_lightning::causal_attention", _attend, mutates_args=())
_backward_opaquely = torch.library.custom_op("milora_lightning::causal_attention_backward", _backward, mutates_args=())
_attend_opaquely.register_fake(lambda q, k, *_: (_empty_like(q), q.new_empty(_weight_count(q, k))))
_backward_opaquely.register_fake(lambda grad, q, k, v, *_: tuple(_empty_like(x) for x in (q, k, v)))
_attend_opaquely.register_autograd(_differentiate, setup_context=_setup_context)

AttentionInterface.register(NAME, causal_blocks_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
