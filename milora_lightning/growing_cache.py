"""Keys and values of a generation, with room for those of the tokens to come."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens more than are there; a multiple would hold on to memory that few answers need


def growing_cache(config: PretrainedConfig) -> DynamicCache:
    """Return transformers' dynamic cache for a model of this configuration, with layers that have room."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, which a new token's join in place, where transformers copies all those before it."""

    keys: Any  # tensors, or None before the first token
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, heads, new tokens, head_dim), and return all that there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_room, value_room = self._rooms
        self.keys, key_room = _appended(self.keys, key_states, key_room)
        self.values, value_room = _appended(self.values, value_states, value_room)
        self._rooms = key_room, value_room
        return self.keys, self.values


def _appended(known: Tensor, new: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """Append tokens to the known ones, in place if these are what the room starts with and it is large enough.

    Returns:
        All tokens (batch, heads, tokens, head_dim), as a view of the room, and the room.
    """
    length = known.shape[2] if known.numel() else 0
    total = length + new.shape[2]
    if room is None or total > room.shape[2] or not _starts(room, known):
        room = new.new_empty(*new.shape[:2], total + ROOM, new.shape[3])
        if length:
            room[:, :, :length] = known
    room[:, :, length:total] = new
    return room[:, :, :total], room


def _starts(room: Tensor, known: Tensor) -> bool:
    """Whether the known tokens lie at the room's beginning: transformers may have put others in their place."""
    return known.data_ptr() == room.data_ptr() and known.stride() == room.stride() and known.shape[0] == room.shape[0]
