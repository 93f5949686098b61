"""Greedy answers to prompts that begin alike, against transformers' own to the whole rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lora import IN, TOKENS, adapted
from test_packing import model_of, tokens_seen
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.attention import NAME
from milora_lightning.generation import generate_greedily, shared_beginning
from milora_lightning.prefill import prefilled
from milora_lightning.surgery import factors_kept

PREFIX, NEW = 9, 12
CONFIG = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)


def trained_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A model whose adapters have left their start, so that they matter."""
    model = model_of(kind, **changes).eval()
    adapters = inject(model, LoRAConfig(r=4))
    initialize(model)
    for layer in adapters.values():
        layer.lora_B.data += 0.1 * torch.randn_like(layer.lora_B)
    return model


def prompts(lengths: tuple[int, ...] = (20, 13, 17)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    beginning = torch.randint(5, 60, (PREFIX,))
    for row, length in zip(input_ids, lengths, strict=True):
        row[-length:] = torch.cat([beginning, torch.randint(5, 60, (length - PREFIX,))])
    input_ids[torch.arange(len(lengths)), PREFIX - torch.tensor(lengths)] = 60 + torch.arange(len(lengths))
    return input_ids, (input_ids > 0).long()


def reference(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    tokens: Tensor = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=CONFIG)
    return tokens[:, input_ids.shape[1] :]


@pytest.mark.parametrize("lengths", [(20, 13, 17), (15, 15)])
@pytest.mark.parametrize("attention", ["eager", "sdpa", NAME])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "gpt2", "opt"])
def test_answers_are_those_to_whole_rows(kind: str, attention: str, lengths: tuple[int, ...]) -> None:
    model = trained_model(kind)
    model.set_attn_implementation(attention)
    batch = prompts(lengths)
    want = reference(model, *batch)
    generate_greedily(model, *batch, CONFIG)  # finds out what the model can do
    seen = tokens_seen(model)
    assert torch.equal(generate_greedily(model, *batch, CONFIG), want)
    assert seen[:2] == [PREFIX, len(lengths) * (max(lengths) - PREFIX)]
    with factors_kept(model):
        assert torch.equal(generate_greedily(model, *batch, CONFIG), want)


@pytest.mark.parametrize(
    ("kind", "changes", "lengths"),
    [("qwen2", {"sliding_window": 8, "use_sliding_window": True}, (20, 13)), ("llama", {}, (20,))],
)
def test_whole_rows_where_nothing_can_be_shared(kind: str, changes: dict[str, Any], lengths: tuple[int, ...]) -> None:
    model = trained_model(kind, **changes)
    batch = prompts(lengths)
    generate_greedily(model, *batch, CONFIG)
    seen = tokens_seen(model)
    assert torch.equal(generate_greedily(model, *batch, CONFIG), reference(model, *batch))
    assert seen[0] == batch[0].numel()


def test_other_beginnings_are_not_shared() -> None:
    input_ids, attention_mask = prompts()
    assert shared_beginning(input_ids, attention_mask) == PREFIX
    input_ids[2, -17 + 3] = 99
    assert shared_beginning(input_ids, attention_mask) == 3
    same = input_ids[:1].expand(2, -1), attention_mask[:1].expand(2, -1)
    assert shared_beginning(*same) == 19  # one token of each row's own is left to continue from


def test_a_model_that_continues_otherwise_gets_whole_rows() -> None:
    """Negative control of the trial, of two ways that are not alike."""
    model = trained_model("llama")
    forward = model.forward

    def shifted(position_ids: Any = None, past_key_values: Any = None, **options: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length() and options["input_ids"].shape[1] > 1:
            position_ids = 3 * position_ids
        return forward(position_ids=position_ids, past_key_values=past_key_values, **options)

    model.forward = shifted
    batch = prompts()
    generate_greedily(model, *batch, CONFIG)
    seen = tokens_seen(model)
    generate_greedily(model, *batch, CONFIG)
    assert seen[0] == batch[0].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_kept_where_they_do_not_change(dtype: torch.dtype) -> None:
    """With no more than float32's rounding in the output, and without effect once the context has ended."""
    layer = adapted().to(dtype)
    x, weight = torch.randn(TOKENS, IN, dtype=dtype), layer.base_layer.weight.clone()
    with torch.no_grad():
        before = layer(x)
        with factors_kept(layer):
            assert (layer.folded is None) == (dtype == torch.bfloat16)  # which would round the update
            kept = layer(x)
            torch.testing.assert_close(kept, before, rtol=0 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
            layer.lora_B += 1
            assert torch.equal(layer(x), kept)  # as they were
        assert not torch.allclose(layer(x), before)
    assert torch.equal(layer.base_layer.weight, weight)
    with factors_kept(layer):
        layer(x).sum().backward()  # gradients need the factors themselves
    assert layer.lora_B.grad.abs().sum() > 0


def test_a_folded_update_is_not_rounded_under_autocast() -> None:
    layer = adapted()
    x = torch.randn(TOKENS, IN)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with factors_kept(layer):
            assert torch.equal(layer(x), before)


@pytest.mark.parametrize("lengths", [(20, 13, 17), (17, 20, 11, 13), (20, 20, 10)])
@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_prompts_in_groups_are_answered_as_together(kind: str, prefix: int, lengths: tuple[int, ...]) -> None:
    """With each row, and rows by threes of their tokens, computed without the padding that longer ones bring."""
    model = trained_model(kind)
    batch = prompts(lengths)
    want = reference(model, *batch)
    for tokens in (1, 3 * max(lengths), 10**6):
        inputs = prefilled(model, *batch, prefix, tokens=tokens)
        answers = model.generate(**inputs, generation_config=CONFIG)[:, batch[0].shape[1] :]
        assert torch.equal(answers, want)


def test_groups_leave_out_padding() -> None:
    model = trained_model("llama")
    batch = prompts((20, 13, 17))
    seen = tokens_seen(model)
    prefilled(model, *batch, prefix=PREFIX, tokens=1)
    assert seen == [PREFIX, 20 - PREFIX - 1, 17 - PREFIX - 1, 13 - PREFIX - 1]
    seen.clear()
    prefilled(model, *prompts((20, PREFIX + 1)), prefix=PREFIX, tokens=1)
    assert seen == [PREFIX]  # a row of one token more is left to generate, with all others
