"""Greedy answers to prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
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


KEPT = (
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "cache_implementation"),
)
"""What a model's own generation config says of any way of generating, not of sampling, beams, penalties or lengths."""


def greedy_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, end_of_turn: str | None = None
) -> GenerationConfig:
    """Return how a model answers greedily: each token its likeliest, of those that its generation config allows.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        max_new_tokens: Length limit of answers.
        end_of_turn: A token that ends an answer, besides those of :func:`stop_ids`.
    """
    own = {name: getattr(model.generation_config, name, None) for name in KEPT}
    given = {name: value for name, value in own.items() if value is not None}
    if tokenizer.pad_token_id is not None:
        given["pad_token_id"] = tokenizer.pad_token_id
    stop = stop_ids(model, tokenizer, end_of_turn)
    if stop:
        given.setdefault("pad_token_id", stop[0])
    return GenerationConfig(**given, eos_token_id=stop or None, max_new_tokens=max_new_tokens, do_sample=False)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn: str | None = None) -> list[int]:
    """Return the tokens that end an answer: the model's, which may be several, the tokenizer's EOS, and another."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    if end_of_turn is not None:
        ids.append(tokenizer.convert_tokens_to_ids(end_of_turn))
    return list(dict.fromkeys(i for i in ids if i is not None))


def without_stop(tokens: Tensor, stop: list[int]) -> list[list[int]]:
    """Cut generated tokens before the first that ends an answer.

    >>> without_stop(torch.tensor([[5, 2, 0], [5, 6, 7]]), [2, 3])
    [[5], [5, 6, 7]]
    """
    ends = set(stop)
    return [list(takewhile(lambda token: token not in ends, row)) for row in tokens.tolist()]


@contextmanager
def nothing_else(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Keep transformers from filling up a config with what a model's own says of sampling and lengths."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


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
