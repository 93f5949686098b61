"""Answers are, token by token, those of a model that reads the whole conversation at each turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import TINY_CONFIGS, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from milora_lightning import LoRAConfig, adapters_disabled, inject, lora_layers
from milora_lightning.models.attention import NAME
from milora_lightning.models.generation import generate_greedily
from milora_lightning.models.turn_cache import TurnCache

SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {**SIZES, **HEADS, "sliding_window": 4}),
    "mistral": ("mistral", {**SIZES, **HEADS, "sliding_window": 4}),
    "mamba": ("mamba", {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "rwkv": ("rwkv", {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
    "bloom": ("bloom", {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "dynamic": ("llama", {**SIZES, **HEADS, "max_position_embeddings": 16, "rope_parameters": ROPE}),
    "blocks": ("llama", {**SIZES, **HEADS}),
}
STARTS_ANEW = {"gemma2", "gemma3", "mistral", "mamba", "rwkv", "dynamic"}


def model_of(kind: str) -> PreTrainedModel:
    if kind in TINY_CONFIGS:
        model = tiny_model(kind)
    else:
        torch.manual_seed(0)
        name, options = OTHERS[kind]
        attention = {"attn_implementation": "causal_blocks"} if kind == "blocks" else {}
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(name, **options), dtype=torch.float32, **attention
        )
    if kind == "blocks":
        model.set_attn_implementation(NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6 if parameter.ndim == 2 else 1  # so that answers hang on what is asked
    return model.eval()


def answer(model: PreTrainedModel, ids: list[int], cache: Any = None, number: int = 5) -> list[int]:
    config = GenerationConfig(max_new_tokens=number, do_sample=False, pad_token_id=0, eos_token_id=None)
    prompt = torch.tensor([ids])
    with torch.no_grad():
        tokens = generate_greedily(model, prompt, torch.ones_like(prompt), config, cache=cache)
    return list(tokens[0].tolist())


def new(seed: int, number: int = 6) -> list[int]:
    return torch.randint(4, 128, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kind", [*TINY_CONFIGS, *OTHERS])
def test_a_conversation_is_answered_as_if_read_anew(kind: str) -> None:
    model = model_of(kind)
    read = TurnCache(model)
    assert read.usable == (kind not in STARTS_ANEW)

    def check(ids: list[int]) -> list[int]:
        cache = read.take("model", ids)
        got = answer(model, ids, cache)
        read.keep("model", ids + got, cache)
        assert got == answer(model, ids)
        return ids + got

    conversation = check(new(1))
    for turn in range(2, 4):
        conversation = check(conversation + new(turn))
    check(conversation[:8] + new(9))  # another turn: what is behind the common beginning is forgotten
    check(new(10))  # a conversation that has nothing in common
    check(new(10))  # the very same prompt
    check(new(10)[:3])  # and its beginning


def test_what_is_read_is_read_once() -> None:
    model = model_of("llama")
    read, widths = TurnCache(model), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    ids = new(1, 20)
    cache = read.take(0, ids)
    ids += answer(model, ids, cache)
    read.keep(0, ids, cache)
    widths.clear()
    answer(model, ids + new(2, 3), read.take(0, ids + new(2, 3)))
    assert widths[0] == 1 + 3  # the answer's last token, and what is new


def test_base_and_adapters_read_by_themselves_and_an_answer_that_is_broken_off_leaves_nothing() -> None:
    model = model_of("llama")
    inject(model, LoRAConfig(r=2))
    for layer in lora_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(factor)
    read = TurnCache(model)
    ids = new(1)
    for turn in range(2, 5):
        cache = read.take("adapter", ids)
        with_adapters = answer(model, ids, cache)
        read.keep("adapter", ids + with_adapters, cache)
        assert with_adapters == answer(model, ids)
        with adapters_disabled(model):
            cache = read.take("base", ids)
            got = answer(model, ids, cache)
            read.keep("base", ids + got, cache)
            assert got == answer(model, ids) != with_adapters
        ids = [*ids, *with_adapters, *new(turn)]
    cache = read.take("adapter", ids)
    assert cache is not None
    assert cache.get_seq_length() > 0
    answer(model, ids, cache, number=2)  # and is not kept
    begun = read.take("adapter", ids)
    assert begun is not None
    assert begun.get_seq_length() == 0
    assert answer(model, ids, begun) == answer(model, ids)
