"""Greedy, beam-search and sampled generation with transformers' ``generate``."""

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
from milora_lightning.parallel.gathering import weights_gathered
from milora_lightning.utils.errors import InvalidInputError


def generate_greedily(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    cache: Cache | None = None,
    **inputs: Tensor,
) -> Tensor:
    """Continue prompts with transformers' ``generate``.

    Args:
        model: Any causal language model of transformers, in eval mode.
        input_ids: Token ids (batch, length), padded on the left.
        attention_mask: 1 for tokens and 0 for padding (batch, length).
        config: Generation config.
        streamer: Receives each token as it is generated; for a single prompt only.
        cache: Keys and values of the tokens already read; those of the new tokens are added to it.
        inputs: Further inputs of the model, such as ``pixel_values``.

    Returns:
        The new tokens (batch, new tokens).
    """
    # Ranks that share a sharded model (FSDP2 or FSDP1) keep generating until the last one is done.
    sharded = is_sharded(model) or is_fsdp_managed_module(model)
    prompts: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    if cache is not None:
        prompts["past_key_values"] = cache
    with weights_gathered(model):
        tokens: Tensor = model.generate(**prompts, generation_config=config, synced_gpus=sharded, streamer=streamer)
    return tokens[:, input_ids.shape[1] :]


INHERITED_OPTIONS = (
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "cache_implementation"),
)
"""Entries taken from a model's generation config: special tokens and the cache, but no sampling or lengths."""


def greedy_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    end_of_turn: str | None = None,
    num_beams: int = 1,
) -> GenerationConfig:
    """Create a config for greedy decoding: always the most likely token, among those that the model's config allows.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        max_new_tokens: Length limit of answers.
        end_of_turn: A further token that ends an answer, in addition to those of :func:`stop_ids`.
        num_beams: Number of beams in beam search; 1 for greedy decoding.
    """
    inherited = {name: getattr(model.generation_config, name, None) for name in INHERITED_OPTIONS}
    options = {name: value for name, value in inherited.items() if value is not None}
    if tokenizer.pad_token_id is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    stop = stop_ids(model, tokenizer, end_of_turn)
    if stop:
        options.setdefault("pad_token_id", stop[0])
    options.update(eos_token_id=stop or None, max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams)
    return GenerationConfig(**options)


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Args:
        temperature: Divisor of the logits before sampling; 0 takes the most likely token.
        top_p: Sample from the smallest set of most likely tokens whose probabilities sum to this.
        top_k: Sample from this many most likely tokens; 0 for all.

    Raises:
        ValueError: If a number is out of range, or has no effect because nothing is sampled.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, in_range, expected in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and 1 at most"),
            ("top_k", self.top_k >= 0, "0 or more"),
        ):
            if not in_range:
                raise InvalidInputError(f"{name} must be {expected}, not {getattr(self, name)}.")
        for name, is_set in (("top_p", self.top_p < 1), ("top_k", self.top_k > 0)):
            if is_set and not self.temperature:
                raise InvalidInputError(
                    f"{name}={getattr(self, name)} has no effect where the most likely token is taken: give a "
                    "temperature, 0.7 for example."
                )

    def applied_to(self, config: GenerationConfig) -> GenerationConfig:
        """Return a copy of a generation config that chooses tokens in this way."""
        config = copy.deepcopy(config)
        if self.temperature:
            config.update(do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        return config


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn: str | None = None) -> list[int]:
    """Return the ids that end an answer: all EOS tokens of the model, the tokenizer's, and ``end_of_turn``.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        end_of_turn: A further token that ends an answer.
    """
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    if end_of_turn is not None:
        ids.append(tokenizer.convert_tokens_to_ids(end_of_turn))
    return list(dict.fromkeys(i for i in ids if i is not None))


def cut_at_stop(tokens: Tensor, stop: list[int]) -> list[list[int]]:
    """Cut each row of generated tokens before the first one that ends an answer.

    Args:
        tokens: Generated token ids (batch, length).
        stop: Ids of the tokens that end an answer.

    >>> import torch
    >>> cut_at_stop(torch.tensor([[5, 2, 0], [5, 6, 7]]), [2, 3])
    [[5], [5, 6, 7]]
    """
    ends = set(stop)
    return [list(takewhile(lambda token: token not in ends, row)) for row in tokens.tolist()]


@contextmanager
def use_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace a model's config within this context: ``generate`` would take sampling options and lengths from it.

    Args:
        model: The model.
        config: The config to use instead.
    """
    original = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = original
