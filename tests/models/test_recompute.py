"""Recomputed layers: the same numbers with less memory, for all layers or a share of them."""

from __future__ import annotations

import pytest
import torch
from helpers.benchmarks import benchmark
from helpers.models import TINY_CONFIGS
from jsonargparse import ArgumentParser
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from milora_lightning import CausalLMModule, LoRAConfig, initialize, inject
from milora_lightning.models.checkpointing import checkpoint_layers
from milora_lightning.models.compile import compile_layers
from milora_lightning.models.loss import causal_lm_loss
from milora_lightning.models.memory import estimate, planned_model
from milora_lightning.models.recompute import recompute_layers

SHARES = (False, 0.5, True)
IDS = torch.randint(1, 128, (3, 12), generator=torch.Generator().manual_seed(0))


def model_with(share: bool | float, kind: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY_CONFIGS[kind])
    inject(model, LoRAConfig(r=4, lora_dropout=0.3))
    initialize(model)
    recompute_layers(model, share)
    return model.train()


def loss_of(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(1)
    return causal_lm_loss(model, IDS, IDS)


def test_losses_and_gradients_are_the_same_and_memory_is_less() -> None:
    found, kept = [], []
    for share in SHARES:
        model = model_with(share)
        kept.append(benchmark("cost").kept_for_backward(lambda m=model: loss_of(m), [*model.parameters(), IDS]))
        loss = loss_of(model)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))
    assert kept[0] > kept[1] > kept[2]
    assert kept[1] == pytest.approx((kept[0] + kept[2]) / 2, rel=0.05)


def test_the_estimate_knows_the_share() -> None:
    model = planned_model(TINY_CONFIGS["llama"], torch.float32, LoRAConfig(r=4))
    sizes = []
    for share in SHARES:
        parts = estimate(model, TINY_CONFIGS["llama"], 4, 32, gradient_checkpointing=share).parts
        sizes.append({part.name: part.size for part in parts}["activations kept"])
    assert sizes[1] == (sizes[0] + sizes[2]) / 2


@pytest.mark.parametrize("share", [-0.1, 8, 1.5])
def test_what_is_no_share_is_refused_at_once(share: float) -> None:
    with pytest.raises(ValueError, match="the share of the layers"):
        CausalLMModule("anything", gradient_checkpointing=share)


def test_models_that_recompute_all_or_none_are_told_so() -> None:
    model = AutoModelForCausalLM.from_config(TINY_CONFIGS["llama"])
    for layer in model.model.layers:
        layer.__class__ = type(type(layer).__name__, (torch.nn.Module,), {})
    with pytest.raises(ValueError, match="all of its layers or none: set gradient_checkpointing to true"):
        recompute_layers(model, 0.5)
    with pytest.raises(ValueError, match="all of its layers or none: set activation_checkpointing to full"):
        checkpoint_layers(model, 2)


def test_models_without_named_layers_are_refused_by_what_was_asked_for() -> None:
    model = AutoModelForCausalLM.from_config(TINY_CONFIGS["llama"])
    model._no_split_modules = None
    with pytest.raises(ValueError, match="cannot recompute a part of them: set gradient_checkpointing"):
        recompute_layers(model, 0.5)
    with pytest.raises(ValueError, match="cannot be compiled: leave compile out"):
        compile_layers(model)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("0.25", 0.25), ("1", 1.0)])
def test_the_command_line_takes_both(text: str, value: bool | float) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(CausalLMModule, "model")
    parsed = parser.parse_args(["--model.name_or_path=x", f"--model.gradient_checkpointing={text}"])
    assert parsed.model.gradient_checkpointing == value
    assert isinstance(parsed.model.gradient_checkpointing, type(value))
