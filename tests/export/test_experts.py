"""Adapters of experts in PEFT's format, as target_parameters, and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import logits, move, tuned
from helpers.models import quiet_trainer, save_tiny_model, tiny_model
from helpers.modules import data, module
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from milora_lightning import MiLoRAInit, export_merged, export_peft, load_peft, lora_layers
from milora_lightning.adapters.experts import LoRAExperts
from milora_lightning.export.merging import merge_adapters
from milora_lightning.export.peft_import import peft_config

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["qwen3_moe", "gpt_oss", "llama4"]


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_an_export_as_the_same_function(kind: str, tmp_path: Path) -> None:
    model = tuned(tmp_path / "base", kind, lora_dropout=0.1, rank_pattern={"down_proj": 3})
    export_peft(model, tmp_path / "peft")
    config = PeftConfig.from_pretrained(tmp_path / "peft")
    assert set(config.target_parameters) == {"experts.gate_up_proj", "experts.down_proj"}
    theirs = PeftModel.from_pretrained(tiny_model(kind), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
    assert (logits(tiny_model(kind)) - logits(model)).abs().max() > 1e-3
    again = tiny_model(kind)
    load_peft(again, tmp_path / "peft")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert lora_layers(again).keys() == lora_layers(model).keys()


def test_a_lower_rank_loses_what_it_says(tmp_path: Path) -> None:
    model = tuned(tmp_path / "base", "qwen3_moe")
    lost = export_peft(model, tmp_path / "small", rank=2)
    assert export_peft(model, tmp_path / "whole", rank=8) == 0
    small = tiny_model("qwen3_moe")
    load_peft(small, tmp_path / "small")
    missing = energy = 0.0
    for name, layer in lora_layers(model).items():
        exact = layer.delta_weight().double()
        missing += (lora_layers(small)[name].delta_weight().double() - exact).square().sum().item()
        energy += exact.square().sum().item()
    assert missing / energy == pytest.approx(lost, rel=1e-3)
    assert lost > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_the_same_function(kind: str, tmp_path: Path) -> None:
    model = tuned(tmp_path / "base", kind)
    want = logits(model)
    assert export_merged(model, tmp_path / "merged") < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=1e-5)
    merge_adapters(model)
    assert not lora_layers(model)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tiny_model(kind).named_parameters()]


THEIRS: dict[str, dict[str, Any]] = {
    "experts alone": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "one stack": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {"experts.down_proj": 2, r"0\.self_attn\.q_proj": 3},
        "alpha_pattern": {"experts.gate_up_proj": 3},
    },
    "rslora": {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"], "use_rslora": True},
    "beside a layer in full": {
        "target_parameters": ["experts.down_proj"],
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
    },
    "a layer's weight": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.down_proj", "v_proj.weight"],
        "rank_pattern": {"v_proj.weight": 2},
    },
}


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("options", THEIRS)
def test_adapters_that_peft_has_trained_are_the_same_function_here(options: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    peft = get_peft_model(tiny_model(kind), LoraConfig(**{"r": 4, "lora_alpha": 6, **THEIRS[options]}))
    move(peft)
    peft.save_pretrained(tmp_path)
    model = tiny_model(kind)
    config = load_peft(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(peft), rtol=0, atol=1e-5)
    assert any(isinstance(layer, LoRAExperts) for layer in lora_layers(model).values())
    assert peft_config(tmp_path) == config


def test_a_run_starts_from_what_peft_has_trained_on_experts(tmp_path: Path) -> None:
    torch.manual_seed(2)
    peft = get_peft_model(tiny_model("qwen3_moe"), LoraConfig(**{"r": 4, "lora_alpha": 6, **THEIRS["patterns"]}))
    move(peft)
    peft.save_pretrained(tmp_path / "peft")
    base = save_tiny_model(tmp_path / "base", "qwen3_moe")
    run = module(base, dtype="float32", optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    callbacks = [MiLoRAInit(start_from=str(tmp_path / "peft"))]
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=callbacks, limit_val_batches=0, num_sanity_val_steps=0)
    trainer.fit(run, data(tmp_path, base))
    torch.testing.assert_close(logits(run.model), logits(peft), rtol=0, atol=1e-5)
    assert sum(isinstance(layer, LoRAExperts) for layer in lora_layers(run).values()) == 4
