"""Packed batches against the same batches row by row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIGS
from test_loss import reference
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.attention import NAME
from milora_lightning.loss import causal_lm_loss, supervised_logits
from milora_lightning.packing import model_inputs, shared_prefix

PREFIX = 10


def model_of(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(TINY_CONFIGS[kind])
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(5, 120, (3, 24))
    input_ids[:, :PREFIX] = input_ids[0, :PREFIX]
    input_ids[:, PREFIX] = torch.arange(3)
    labels = input_ids.clone()
    labels[:, :14] = labels[1, 20:] = -100
    return input_ids, labels


PACKED = PREFIX + (23 - PREFIX) + (19 - PREFIX) + (23 - PREFIX)  # up to the tokens that predict each row's last label


def tokens_seen(model: PreTrainedModel) -> list[int]:
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    return seen


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_whole_rows(kind: str, checkpointing: bool) -> None:
    model = model_of(kind).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapters = inject(model, LoRAConfig(r=4))
    initialize(model)
    trained = [p for layer in adapters.values() for p in (layer.lora_A, layer.lora_B)]
    causal_lm_loss(model, *batch())  # finds out what the model can do
    seen = tokens_seen(model)
    got = causal_lm_loss(model, *batch())
    assert seen == [PACKED]
    want = reference(model, *batch())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, trained), torch.autograd.grad(want, trained), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("shares", [False, True])
def test_logits_come_in_the_order_of_the_rows(shares: bool) -> None:
    model = model_of("llama").eval()
    input_ids, labels = batch()
    if not shares:
        input_ids[:, 0] = torch.arange(3)
    assert "packing" in model_inputs(model, input_ids, labels)[0]
    want = model(input_ids=input_ids).logits[:, :-1][labels[:, 1:] != -100]
    torch.testing.assert_close(supervised_logits(model, input_ids, labels), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {"attention_dropout": 0.1}), ("qwen2", {"sliding_window": 8}), ("gpt2", {}), ("opt", {})],
)
def test_models_that_attend_otherwise_get_whole_rows(kind: str, changes: dict[str, Any]) -> None:
    model = model_of(kind, **changes).train()
    input_ids, labels = batch()
    inputs, supervised = model_inputs(model, input_ids, labels)
    assert set(inputs) == {"input_ids"}
    assert inputs["input_ids"].shape == input_ids.shape == supervised.shape
    assert torch.isfinite(causal_lm_loss(model, input_ids, labels))


def test_trained_adapters_with_dropout_do_not_decide() -> None:
    """A run that is resumed lays its batches out as the one that was interrupted."""
    model = model_of("llama").train()
    for layer in inject(model, LoRAConfig(r=4, lora_dropout=0.5)).values():
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
        layer.initialized = True
        layer.train()
    assert "position_ids" in model_inputs(model, *batch())[0]


def test_rows_without_labels_are_left_out() -> None:
    """But for the model's own run, for which ranks that share it wait."""
    model = model_of("llama").train()
    input_ids, labels = batch()
    want = causal_lm_loss(model, input_ids[:2], labels[:2])
    labels[2] = -100
    torch.testing.assert_close(causal_lm_loss(model, input_ids, labels), want)
    seen = tokens_seen(model)
    causal_lm_loss(model, input_ids, labels)
    assert seen == [PREFIX + (23 - PREFIX) + (19 - PREFIX)]
    assert causal_lm_loss(model, input_ids, torch.full_like(labels, -100)).item() == 0
    assert seen[1:] == [input_ids.numel()]


def test_batches_without_labels_find_out_too() -> None:
    """Of ranks that share a model, none may run it more often than the others."""
    model = model_of("llama")
    seen = tokens_seen(model)
    input_ids, labels = batch()
    unlabelled = torch.full_like(labels, -100)
    assert set(model_inputs(model, input_ids, unlabelled)[0]) == {"input_ids"}
    assert len(seen) == 2
    model_inputs(model, input_ids, labels)
    assert len(seen) == 2


def test_finding_out_leaves_the_random_state_alone() -> None:
    model, rows = model_of("llama"), batch()
    state = torch.get_rng_state()
    model_inputs(model, *rows)
    assert torch.equal(state, torch.get_rng_state())


def test_a_prefix_ends_before_what_counts() -> None:
    input_ids, labels = batch()
    assert shared_prefix(input_ids, labels) == PREFIX
    assert shared_prefix(input_ids[:1], labels[:1]) == 0
    everything = input_ids.clone()
    assert shared_prefix(everything, everything) == 0
    alike = input_ids[:1].expand(3, -1)
    assert shared_prefix(alike, labels[:1].expand(3, -1)) == 13  # token 13 predicts the first label
    assert shared_prefix(alike, torch.full_like(labels, -100)) == 23
