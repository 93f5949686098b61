"""Greedy answers to prompts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_managed_module

from milora_lightning.growing_cache import GrowingLayer, growing_cache
from milora_lightning.packing import SHORTEST, attends_to_all
from milora_lightning.prefill import prefilled
from milora_lightning.sharding import is_sharded
from milora_lightning.surgery import adapters_disabled
from milora_lightning.trials import close_logits, once_per_model


def generate_greedily(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig
) -> Tensor:
    """Continue prompts, without computing most of the padding, nor twice the preamble that they share, where possible.

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
        inputs = prefilled(model, input_ids, attention_mask, prefix if prefix >= SHORTEST else 0)
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


@once_per_model
def _can_continue(model: PreTrainedModel) -> bool:
    """Whether a model continues prompts in both ways alike; found out by trying."""
    takes_cache = "past_key_values" in inspect.signature(model.forward).parameters and not model._is_stateful
    return takes_cache and attends_to_all(model) and _has_plain_layers(model) and _continues_the_same(model)


def _has_plain_layers(model: PreTrainedModel) -> bool:
    return all(type(layer) is GrowingLayer for layer in growing_cache(model.config).layers)


def _continues_the_same(model: PreTrainedModel) -> bool:
    input_ids = torch.tensor([[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]], device=model.device)
    attention_mask = (input_ids > 0).long()
    config = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    rows = {"input_ids": input_ids, "attention_mask": attention_mask}
    with adapters_disabled(model):
        shared = prefilled(model, input_ids, attention_mask, prefix=2, tokens=1)
        plain, continued = (model.generate(**inputs, generation_config=config).logits[0] for inputs in (rows, shared))
    return close_logits(plain, continued, model.dtype)
