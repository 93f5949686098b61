"""The operator of block-wise causal attention: within whole sequences, and within rows packed into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from milora_lightning.operators import differentiate, operator

BLOCK = 64  # positions whose queries meet the same keys, those up to the block's end


class Packing(NamedTuple):
    """How rows lie in one sequence: first what they all begin with, then the rest of each, without padding.

    Attributes:
        prefix: How many tokens the rows share. A row attends to itself and them.
        rows: The number of rows.
        length: Length of the longest row, without the prefix.
        slots: Where each token after the prefix lies (tokens,) among the rows written below each other, padded on
            the right to that length; ascending, int64.
    """

    prefix: int
    rows: int
    length: int
    slots: Tensor


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


class _Layout:
    """Divides the tokens of a batch into parts that attend alike, and puts them together again."""

    def __init__(self, prefix: int, rows: int, length: int, slots: Tensor | None) -> None:
        self.prefix, self.rows, self.length, self.slots = prefix, rows, length, slots
        if slots is not None:
            # Looking up what goes where is six times as fast as writing it there.
            self.tokens = slots.new_full((rows * length,), -1)
            self.tokens[slots] = torch.arange(prefix, prefix + len(slots), device=slots.device)
            self.padding = (self.tokens < 0).nonzero()[:, 0]
            self.tokens.clamp_min_(0)

    def divide(self, x: Tensor) -> list[Tensor]:
        """Bring (batch, heads, length, head_dim) to one or two parts (rows, length, heads, head_dim), prefix first."""
        tokens = x.transpose(1, 2)
        if self.slots is None:
            return [tokens]
        padded = tokens[0].index_select(0, self.tokens).index_fill_(0, self.padding, 0)
        own = padded.view(self.rows, self.length, *tokens.shape[2:])
        return [tokens[:, : self.prefix], own] if self.prefix else [own]

    def unite(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`divide`, but for the order of heads and tokens: (batch, length, heads, head_dim)."""
        if self.slots is None:
            return parts[0]
        own = parts[-1].flatten(0, 1)
        united = own.new_empty(1, self.prefix + len(self.slots), *own.shape[1:])
        if self.prefix:
            united[:, : self.prefix] = parts[0]
        torch.index_select(own, 0, self.slots, out=united[0, self.prefix :])
        return united


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, prefix: int, rows: int, length: int, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    layout, counts = _Layout(prefix, rows, length, slots), _counts(query, key, prefix, rows, length, slots)
    weights = query.new_empty(sum(counts))
    outputs = []
    divided = [layout.divide(x) for x in (query, key, value)]
    for task, part in zip(_tasks(scaling, *divided), torch.split(weights, counts), strict=True):
        outputs.append(task[0].new_empty(task[0].shape))
        _attend_part(*task, part, outputs[-1])
    return layout.unite(outputs), weights


def _attend_part(q: Tensor, k: Tensor, v: Tensor, before: int, weights: Tensor, output: Tensor) -> None:
    triangle = q.new_full((BLOCK, BLOCK), -torch.inf).triu_(1).unsqueeze(1)  # the same for all heads of a group
    for block, probabilities in _blocks(q, k, before, weights):
        seen_k, seen_v = (x[:, : probabilities.shape[2]].contiguous() for x in (k, v))
        scores = torch.bmm(_rows(q[:, block], k), seen_k.mT)
        length, first = block.stop - block.start, (before + block.start) % BLOCK
        last_block = scores.view(len(k), length, -1, scores.shape[2])[..., -BLOCK:]
        last_block += triangle[first : first + length]
        torch.softmax(scores, -1, out=probabilities)
        _set_rows(output[:, block], k, torch.bmm(probabilities, seen_v))


def _attend_shapes(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, prefix: int, rows: int, length: int, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    weights = query.new_empty(sum(_counts(query, key, prefix, rows, length, slots)))
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
    layout, counts = _Layout(prefix, rows, length, slots), _counts(query, key, prefix, rows, length, slots)
    outer, parts = layout.divide(grad.transpose(1, 2)), torch.split(weights, counts)
    divided = [layout.divide(x) for x in (query, key, value)]
    grad_qs = [part.new_empty(part.shape) for part in divided[0]]
    grad_ks, grad_vs = ([part.new_zeros(part.shape) for part in xs] for xs in divided[1:])
    for i, task in enumerate(_tasks(scaling, *divided)):
        grad_k, grad_v = _backward_part(*task, parts[i], outer[i], grad_qs[i])
        _add_to_parts(grad_ks[: i + 1], grad_k * scaling)
        _add_to_parts(grad_vs[: i + 1], grad_v)
    grad_q, grad_k, grad_v = (layout.unite(x).transpose(1, 2) for x in (grad_qs, grad_ks, grad_vs))
    return grad_q, grad_k, grad_v


def _backward_part(
    q: Tensor, k: Tensor, v: Tensor, before: int, weights: Tensor, grad: Tensor, grad_q: Tensor
) -> tuple[Tensor, Tensor]:
    sums: list[Tensor] = []
    for block, probabilities in _blocks(q, k, before, weights):
        seen_k, seen_v = (x[:, : probabilities.shape[2]].contiguous() for x in (k, v))
        rows, g = (_rows(x[:, block], k) for x in (q, grad))
        grad_p = torch.bmm(g, seen_v.mT)
        grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype)
        _set_rows(grad_q[:, block], k, torch.bmm(grad_s, seen_k))
        grads = torch.bmm(grad_s.mT, rows), torch.bmm(probabilities.mT, g)
        for total, part in zip(sums, grads, strict=False):
            total[:, : part.shape[1]] += part
        sums = sums or list(grads)  # of the first block, which meets all keys
    return sums[0], sums[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scaling, prefix, rows, length, slots = inputs
    ctx.save_for_backward(*tensors, slots, output[1])
    ctx.options = scaling, prefix, rows, length


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


def _tasks(
    scaling: float, qs: Sequence[Tensor], ks: Sequence[Tensor], vs: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Yield the queries of each part, the scaled keys and the values they see, and the positions before them."""
    for i, q in enumerate(qs):
        k, v = (_joined(parts[: i + 1], len(q)) for parts in (ks, vs))
        yield q, k * scaling, v, sum(part.shape[1] for part in ks[: i + 1]) - q.shape[1]


def _joined(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Bring what rows see of keys or values to (rows · key-value heads, whole blocks, head_dim)."""
    heads, width = parts[0].shape[2:]
    lengths = [part.shape[1] for part in parts]
    length = sum(lengths)
    joined = parts[0].new_zeros(rows, heads, -(-length // BLOCK) * BLOCK, width)
    for part, columns in zip(parts, torch.split(joined[:, :, :length], lengths, 2), strict=True):
        columns.copy_(part.transpose(1, 2))
    return joined.flatten(0, 1)


def _add_to_parts(parts: Sequence[Tensor], joined: Tensor) -> None:
    """Add what :func:`_joined` brought together, or its gradient, to the parts."""
    lengths = [part.shape[1] for part in parts]
    by_row = joined.view(len(parts[-1]), parts[0].shape[2], *joined.shape[1:])[:, :, : sum(lengths)]
    for part, columns in zip(parts, torch.split(by_row, lengths, 2), strict=True):
        part += columns.transpose(1, 2).sum_to_size(part.shape)


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """View (rows, queries, heads, head_dim) as (rows, key-value heads, queries, group of heads, head_dim)."""
    rows, queries, _, width = x.shape
    return x.view(rows, queries, len(k) // rows, -1, width).transpose(1, 2)


def _rows(x: Tensor, k: Tensor) -> Tensor:
    """Bring (rows, queries, heads, head_dim) to (rows · key-value heads, queries · group, head_dim)."""
    return _by_group(x, k).flatten(0, 1).flatten(1, 2)


def _set_rows(x: Tensor, k: Tensor, rows: Tensor) -> None:
    """Undo :func:`_rows`, into x."""
    into = _by_group(x, k)
    into.copy_(rows.view_as(into))


def _blocks(q: Tensor, k: Tensor, before: int, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cut queries that have so many positions before them into blocks: first the last one, which meets all keys.

    Yields:
        The queries of each block, and its attention weights (rows · key-value heads, queries · group, keys).
    """
    rows, stop, heads, _ = q.shape
    taken = 0
    for keys in range(k.shape[1], before // BLOCK * BLOCK, -BLOCK):
        start = max(keys - BLOCK - before, 0)
        size = rows * heads * (stop - start) * keys
        yield slice(start, stop), weights[taken : taken + size].view(len(k), -1, keys)
        stop, taken = start, taken + size


def _counts(query: Tensor, key: Tensor, prefix: int, rows: int, length: int, slots: Tensor | None) -> list[int]:
    """The number of attention weights of each part: in closed form, as torch.compile needs it."""
    batch, heads, queries, keys = *query.shape[:3], key.shape[2]

    def first(positions: int) -> int:
        """How many keys the queries of the first positions meet: each as many as its block and those before have."""
        whole, rest = positions // BLOCK, positions % BLOCK
        return BLOCK * BLOCK * (whole * (whole + 1) // 2) + rest * BLOCK * (whole + 1)

    if slots is None:
        return [batch * heads * (first(keys) - first(keys - queries))]
    own = rows * heads * (first(prefix + length) - first(prefix))
    return [heads * first(prefix), own] if prefix else [own]
