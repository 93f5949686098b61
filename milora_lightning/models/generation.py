"""Answers to prompts: of the likeliest tokens, or of drawn ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.fsdp import is_fsdp_managed_module

from milora_lightning.parallel.dtensor import is_sharded
from milora_lightning.utils.errors import InvalidInputError


def generate_greedily(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Continue prompts, by transformers' own ``generate``.

    Args:
        model: Any causal language model of transformers, in evaluation.
        input_ids: Token ids (batch, length), padded on the left.
        attention_mask: 1 for tokens and 0 for padding (batch, length).
        config: What ``generate`` is told.
        streamer: Takes each token as it comes, of one prompt.
        cache: What the model has read of the prompts already; it takes up what is read now.

    Returns:
        The new tokens (batch, new tokens).
    """
    # Ranks that share a model's shards (by FSDP2, by FSDP1) go on until the last of them is done.
    sharded = is_sharded(model) or is_fsdp_managed_module(model)
    prompts: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if cache is not None:
        prompts["past_key_values"] = cache
    tokens: Tensor = model.generate(**prompts, generation_config=config, synced_gpus=sharded, streamer=streamer)
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


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: What the logits are divided by before a token is drawn; 0 takes the likeliest.
        top_p: Draw from the fewest likeliest tokens whose probabilities sum to this.
        top_k: Draw from this many likeliest tokens; 0 for all.

    Raises:
        ValueError: If a number is out of range, or has no effect because nothing is drawn.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, right, range in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and 1 at most"),
            ("top_k", self.top_k >= 0, "0 or more"),
        ):
            if not right:
                raise InvalidInputError(f"{name} must be {range}, not {getattr(self, name)}.")
        for name, effect in (("top_p", self.top_p < 1), ("top_k", self.top_k > 0)):
            if effect and not self.temperature:
                raise InvalidInputError(
                    f"{name}={getattr(self, name)} has no effect where the likeliest token is taken: give a "
                    "temperature, 0.7 for example."
                )

    def applied_to(self, config: GenerationConfig) -> GenerationConfig:
        """Return a copy of what ``generate`` is told that chooses tokens in this way."""
        config = copy.deepcopy(config)
        if self.temperature:
            chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            config.update(do_sample=True, **chosen)
        return config


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
