"""Greedy answers to prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.fsdp import is_fsdp_managed_module

from milora_lightning.sharding import is_sharded


def generate_greedily(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig
) -> Tensor:
    """Continue prompts, by transformers' own ``generate``.

    Args:
        model: Any causal language model of transformers, in evaluation.
        input_ids: Token ids (batch, length), padded on the left.
        attention_mask: 1 for tokens and 0 for padding (batch, length).
        config: What ``generate`` is told.

    Returns:
        The new tokens (batch, new tokens).
    """
    # Ranks that share a model's shards (by FSDP2, by FSDP1) go on until the last of them is done.
    sharded = is_sharded(model) or is_fsdp_managed_module(model)
    prompts = {"input_ids": input_ids, "attention_mask": attention_mask}
    tokens: Tensor = model.generate(**prompts, generation_config=config, synced_gpus=sharded)
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

    >>> import torch
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
