"""Greedy answers to prompts, whose common beginning is computed once."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_managed_module

from milora_lightning.growing_cache import growing_cache
from milora_lightning.prefix import SHORTEST, attends_to_all
from milora_lightning.sharding import is_sharded
from milora_lightning.surgery import adapters_disabled
from milora_lightning.trials import close_logits, once_per_model


def generate_greedily(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig
) -> Tensor:
    """Continue prompts, the preamble that all of them share being computed for one row only, where the model can.

    That takes an architecture whose attention has no windows, and a model that is not in shards.

    Args:
        model: Any causal language model of transformers, in evaluation.
        input_ids: Token ids (batch, length), padded on the left.
        attention_mask: 1 for tokens and 0 for padding (batch, length).
        config: What transformers' ``generate`` is told.

    Returns:
        The new tokens (batch, new tokens).
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    sharded = is_sharded(model) or is_fsdp_managed_module(model)  # by FSDP2, by FSDP1
    # Not with shards, whose ranks must call the model equally often, whatever their prompts are.
    if not sharded and not model.training and _can_continue(model):
        prefix = shared_beginning(input_ids, attention_mask)
        if prefix >= SHORTEST:
            inputs = _with_prefix_known(model, input_ids, attention_mask, prefix)
        else:
            inputs["past_key_values"] = growing_cache(model.config)
    # Ranks that share a model's shards go on until the last of them is done.
    tokens: Tensor = model.generate(**inputs, generation_config=config, synced_gpus=sharded)
    return tokens[:, input_ids.shape[1] :]


def shared_beginning(input_ids: Tensor, attention_mask: Tensor) -> int:
    """Return how many first tokens all prompts share, each of them having one more at least.

    >>> ids, mask = torch.tensor([[0, 5, 6, 7], [5, 6, 8, 9]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    >>> shared_beginning(ids, mask)
    2
    """
    if len(input_ids) < 2:
        return 0
    length = input_ids.shape[1]
    lengths, columns = attention_mask.sum(1), torch.arange(length, device=input_ids.device)
    first = input_ids.gather(1, (length - lengths[:, None] + columns).clamp_max(length - 1))
    alike = (first == first[:1]).all(0) & (columns < lengths.min() - 1)
    return int(alike.long().cumprod(0).sum())


@torch.no_grad()
def _with_prefix_known(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, prefix: int
) -> dict[str, Any]:
    """Move the padding behind the prefix, whose keys and values are then known for all rows."""
    length = input_ids.shape[1]
    columns, padding = torch.arange(length, device=input_ids.device), length - attention_mask.sum(1, keepdim=True)
    behind = torch.where(columns - prefix < padding, columns - prefix, columns)
    source = torch.where(columns < prefix, padding + columns, behind)
    rows = input_ids.gather(1, source)
    cache = growing_cache(model.config)
    model(input_ids=rows[:1, :prefix], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(rows))
    return {"input_ids": rows, "attention_mask": attention_mask.gather(1, source), "past_key_values": cache}


@once_per_model
def _can_continue(model: PreTrainedModel) -> bool:
    """Whether a model continues prompts in both ways alike; found out by trying."""
    takes_cache = "past_key_values" in inspect.signature(model.forward).parameters and not model._is_stateful
    return takes_cache and attends_to_all(model) and _continues_the_same(model)


def _continues_the_same(model: PreTrainedModel) -> bool:
    input_ids = torch.tensor([[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]], device=model.device)
    attention_mask = (input_ids > 0).long()
    config = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    rows = {"input_ids": input_ids, "attention_mask": attention_mask}
    with adapters_disabled(model):
        shared = _with_prefix_known(model, input_ids, attention_mask, prefix=3)
        plain, continued = (model.generate(**inputs, generation_config=config).logits[0] for inputs in (rows, shared))
    return close_logits(plain, continued, model.dtype)
