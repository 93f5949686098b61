"""Keys and values of prompts, computed without most of their padding and with their common beginning only once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from milora_lightning.growing_cache import growing_cache

TOKENS = 1024  # of rows that are computed together; fewer at a time make the matrix products slower


@torch.no_grad()
def prefilled(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, prefix: int, tokens: int = TOKENS
) -> dict[str, Any]:
    """Compute the keys and values of prompts, and return what ``generate`` needs to go on from there.

    Rows about equally long are computed together, and padded to the longest of them; their keys and values then come
    into one cache. A batch that is not worth dividing is left to ``generate``, except for its prefix.

    Args:
        model: A causal language model whose layers all attend to everything before.
        input_ids: Token ids (batch, length), padded on the left.
        attention_mask: 1 for tokens and 0 for padding (batch, length).
        prefix: How many first tokens all prompts share, fewer than the shortest has.
        tokens: How many of them, padding included, are computed together at least.
    """
    rows, mask = _padding_behind(prefix, input_ids, attention_mask)
    inputs = {"input_ids": rows, "attention_mask": mask}
    known = growing_cache(model.config)
    if prefix:
        model(input_ids=rows[:1, :prefix], past_key_values=known, use_cache=True)
    own = mask.sum(1) - prefix
    parts = list(_parts(own, tokens))
    if len(parts) == 1 or own.min() == 1:  # the last token is left to generate, and a row needs another one
        return {**inputs, "past_key_values": _of_rows(known, len(rows), model)}
    caches = [(part, _prefilled_part(model, rows[part, :-1], mask[part, :-1], known, prefix)) for part in parts]
    return {**inputs, "past_key_values": _joined(caches, prefix, rows.shape[1] - 1, model)}


def _padding_behind(prefix: int, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding on the left behind the first ``prefix`` tokens of each row."""
    length = input_ids.shape[1]
    columns, padding = torch.arange(length, device=input_ids.device), length - attention_mask.sum(1, keepdim=True)
    behind = torch.where(columns - prefix < padding, columns - prefix, columns)
    source = torch.where(columns < prefix, padding + columns, behind)
    return input_ids.gather(1, source), attention_mask.gather(1, source)


def _parts(lengths: Tensor, tokens: int) -> Iterator[Tensor]:
    """Divide rows into groups of about equal lengths, each of so many tokens or more if there are as many left."""
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        stop = start + max(1, -(-tokens // int(lengths[order[start]])))
        yield order[start:stop]
        start = stop


def _prefilled_part(
    model: PreTrainedModel, rows: Tensor, mask: Tensor, known: DynamicCache, prefix: int
) -> DynamicCache:
    """Compute the keys and values of rows without the padding that all of them have."""
    padding = rows.shape[1] - int(mask.sum(1).max())
    keep = torch.cat([torch.arange(prefix), torch.arange(prefix + padding, rows.shape[1])]).to(rows.device)
    cache = _of_rows(known, len(rows), model)
    # For one token, which is not used, because it knows what else each model's forward is to be told.
    config = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)
    inputs = {"input_ids": rows[:, keep], "attention_mask": mask[:, keep], "past_key_values": cache}
    model.generate(**inputs, generation_config=config)
    return cache


def _of_rows(known: DynamicCache, rows: int, model: PreTrainedModel) -> DynamicCache:
    """Return a cache in which each of so many rows starts with what is known."""
    cache = growing_cache(model.config)
    for index, layer in enumerate(known.layers):
        if layer.is_initialized:
            cache.update(*(x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values)), index)
    return cache


def _joined(parts: list[tuple[Tensor, DynamicCache]], prefix: int, length: int, model: PreTrainedModel) -> DynamicCache:
    """Bring the caches of groups of rows into one, with each row's padding behind its prefix."""
    cache = growing_cache(model.config)
    batch = sum(len(rows) for rows, _ in parts)

    def joined(states: list[Tensor]) -> Tensor:
        heads, _, width = states[0].shape[1:]
        together = states[0].new_zeros(batch, heads, length, width)
        for (rows, _), part in zip(parts, states, strict=True):
            behind = length - part.shape[2] + prefix
            together[rows, :, :prefix] = part[:, :, :prefix]
            together[rows, :, behind:] = part[:, :, prefix:]
        return together

    for index in range(len(cache.layers)):
        layers = [part.layers[index] for _, part in parts]
        cache.update(joined([layer.keys for layer in layers]), joined([layer.values for layer in layers]), index)
    return cache
