"""Where heads of tokens lie for the products of block-wise attention, also those of rows packed into one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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


class Block(NamedTuple):
    """Queries that meet the same keys, those up to the end of a block of positions.

    Attributes:
        part: Index of the keys they are of: of the prefix, if there is one, or of the rows.
        positions: Which of each row's queries they are.
        offset: Where in the block the first of them stands.
        keys: How many keys they meet.
        queries: Where their units lie in the order of an :class:`Arrangement`.
        weights: Where their attention weights lie among all.
    """

    part: int
    positions: slice
    offset: int
    keys: int
    queries: slice
    weights: slice


class Arrangement:
    """Brings heads of tokens to where products take them, and back, in one look-up each way.

    What is looked up are units: for a token and a key-value head, its key, its value, or the queries that meet keys.
    Keys and values come by row, key-value head and position, filled up to whole blocks; queries come block after
    block, and so within each. Where a row has no token, zeros stand in.

    Args:
        query: Queries (batch, heads, queries, head_dim), those of the last positions.
        key: Keys (batch, key-value heads, length, head_dim).
        packing: If given, the batch is one sequence of packed rows.
    """

    def __init__(self, query: Tensor, key: Tensor, packing: Packing | None) -> None:
        self.heads, self.prefix = key.shape[1], 0 if packing is None else packing.prefix
        self.query_shape, self.key_shape = (x.transpose(1, 2).shape for x in (query, key))
        parts = _tokens(query, key, packing)
        queries, keys = zip(*parts, strict=True)
        self.keys = [self._units(_whole_blocks(tokens)) for tokens in keys]
        units = [self._units(tokens) for tokens in queries]
        self.blocks = list(_blocks(list(zip(units, keys, strict=True)), query.shape[1]))
        self.order = torch.cat([units[block.part][:, :, block.positions].flatten() for block in self.blocks])

    def arrange_queries(self, x: Tensor) -> Tensor:
        """Bring (batch, heads, queries, head_dim) to units in this order."""
        return _look_up(_units(x, self.heads), self.order)

    def arrange_keys(self, x: Tensor) -> list[Tensor]:
        """Bring (batch, key-value heads, length, head_dim) to (rows · key-value heads, whole blocks, head_dim)."""
        units = _units(x, self.heads)
        return [_look_up(units, part.flatten()).view(-1, part.shape[2], units.shape[1]) for part in self.keys]

    def restore_queries(self, x: Tensor) -> Tensor:
        """Undo :meth:`arrange_queries`, but for the order of dimensions: (batch, queries, heads, head_dim)."""
        return x.index_select(0, _inverse(self.order, self._count(self.query_shape))).view(self.query_shape)

    def sum_keys(self, parts: Sequence[Tensor]) -> Tensor:
        """Sum over all that :meth:`arrange_keys` made of a token: (batch, length, key-value heads, head_dim)."""
        own = self.keys[-1].clone()
        own[:, :, : self.prefix] = -1
        flat = parts[-1].flatten(0, 1)
        tokens = flat.index_select(0, _inverse(own.flatten(), self._count(self.key_shape))).view(self.key_shape)
        if self.prefix:
            shared = flat.view(*own.shape, -1)[:, :, : self.prefix].sum(0) + parts[0][:, : self.prefix]
            tokens[0, : self.prefix] = shared.transpose(0, 1)
        return tokens

    def _units(self, tokens: Tensor) -> Tensor:
        """Turn tokens (rows, length) into units (rows, key-value heads, length); where there is none, both are < 0."""
        return tokens.unsqueeze(1) * self.heads + torch.arange(self.heads, device=tokens.device).unsqueeze(1)

    def _count(self, shape: Sequence[int]) -> int:
        return shape[0] * shape[1] * self.heads


def weight_count(query: Tensor, key: Tensor, packing: Packing | None) -> int:
    """Count the attention weights of all blocks: in closed form, as torch.compile needs it."""
    batch, heads, queries, length = *query.shape[:3], key.shape[2]

    def first(positions: int) -> int:
        """How many keys the queries of the first positions meet: each as many as its block and those before have."""
        whole, rest = positions // BLOCK, positions % BLOCK
        return BLOCK * BLOCK * (whole * (whole + 1) // 2) + rest * BLOCK * (whole + 1)

    if packing is None:
        return batch * heads * (first(length) - first(length - queries))
    before = first(packing.prefix)
    return heads * (before + packing.rows * (first(packing.prefix + packing.length) - before))


def _tokens(query: Tensor, key: Tensor, packing: Packing | None) -> list[tuple[Tensor, Tensor]]:
    """Number the tokens of each part that are queries (rows, queries) and keys (rows, keys), -1 where there is none."""

    def numbers(start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=query.device)

    if packing is None:
        queries, keys = (numbers(0, len(x) * x.shape[2]).view(len(x), -1) for x in (query, key))
        return [(queries, keys)]
    prefix, rows, length, slots = packing
    own = slots.new_full((rows * length,), -1).scatter_(0, slots, numbers(prefix, prefix + len(slots))).view(rows, -1)
    shared = numbers(0, prefix).unsqueeze(0)
    part = own, torch.cat([shared.expand(rows, -1), own], 1)
    return [(shared, shared), part] if prefix else [part]


def _blocks(parts: Sequence[tuple[Tensor, Tensor]], query_heads: int) -> Iterator[Block]:
    """Cut each part, given by units of queries and tokens of keys: first the last block, which meets all keys."""
    taken = weights = 0
    for part, (units, tokens) in enumerate(parts):
        rows, heads, stop = units.shape
        before = tokens.shape[1] - stop
        for keys in range(-(-tokens.shape[1] // BLOCK) * BLOCK, before // BLOCK * BLOCK, -BLOCK):
            start = max(keys - BLOCK - before, 0)
            count, size = rows * heads * (stop - start), rows * query_heads * (stop - start) * keys
            here = slice(taken, taken + count), slice(weights, weights + size)
            yield Block(part, slice(start, stop), (before + start) % BLOCK, keys, *here)
            stop, taken, weights = start, taken + count, weights + size


def _whole_blocks(tokens: Tensor) -> Tensor:
    return F.pad(tokens, (0, -tokens.shape[1] % BLOCK), value=-1)


def _units(x: Tensor, heads: int) -> Tensor:
    """View (batch, a multiple of heads, length, head_dim) as (batch · length · heads, features)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1] // heads * x.shape[3])


def _look_up(units: Tensor, order: Tensor) -> Tensor:
    """Bring units into an order, with zeros where it names none."""
    found = units.index_select(0, order.clamp_min(0))
    return found.index_fill_(0, (order < 0).nonzero()[:, 0], 0)


def _inverse(order: Tensor, count: int) -> Tensor:
    """Tell for each of so many units where it stands in an order, and 0 if nowhere."""
    places = order.new_zeros(count + 1)
    places.scatter_(0, order.where(order >= 0, count), torch.arange(len(order), device=order.device))
    return places[:count]
