"""The plan on paper: memory as preview estimates it, operations as the package's own code does them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from milora_lightning import LoRAConfig, inject, lora_layers
from milora_lightning.models.activations import active_intermediate
from milora_lightning.models.memory import estimate, planned_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
DENSE = LlamaConfig(**SIZES)
EXPERTS = Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=96, num_experts=8, num_experts_per_tok=2)


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    import scale

    return scale


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_preview_estimates(scale: Any, config: PretrainedConfig, checkpointing: bool) -> None:
    """Preview calls the same function, for the device and the strategy of the run."""
    run = scale.Run(config, r=8, batch_size=2, length=64, checkpointing=checkpointing)
    vars(run)["layer"] = scale.Layer([], [])  # of no interest here
    model = planned_model(config, torch.bfloat16, run.adapters)

    def preview(shards: int) -> float:
        how: dict[str, Any] = {"gradient_checkpointing": checkpointing, "device": "cuda", "shards": shards}
        return estimate(model, config, 2, 64, **how).peak

    roomy = scale.DEVICES["H100"]
    narrow = replace(roomy, memory=preview(1) - 1)
    for gpus in (1, 8):
        plan = scale.planned(run, roomy, gpus)
        assert (plan.sharded, plan.memory) == (False, preview(1))
        plan = scale.planned(run, narrow, gpus)
        assert (plan.sharded, plan.memory) == (gpus > 1, preview(gpus))
    assert preview(8) < preview(1)


def test_shards_share_what_is_held_and_gather_two_layers() -> None:
    model = planned_model(DENSE, torch.bfloat16, LoRAConfig(8, target_modules="all-linear"))
    parts = [{part.name: part.size for part in estimate(model, DENSE, 2, 64, shards=n).parts} for n in (1, 4)]
    held = ("frozen weights", "adapters", "their gradients", "AdamW's state")
    assert all(parts[1][name] == pytest.approx(parts[0][name] / 4, abs=1) for name in held)
    layers = [layer for layer in model.modules() if type(layer).__name__ == "LlamaDecoderLayer"]
    inside = sum(p.nbytes for layer in layers for p in layer.parameters())
    whole = sum(p.nbytes for p in model.parameters())
    assert parts[1]["gathered"] == whole - inside + inside * 2 // 4
    assert "gathered" not in parts[0]


def test_products_are_those_of_the_package(scale: Any) -> None:
    """The same layers, with values, on the CPU."""
    adapters = LoRAConfig(8, target_modules="all-linear")
    layer = scale.decoder_layer(DENSE, adapters, 2, 64)
    counted = sum(operation.flops for operation in [*layer.forward, *layer.backward])
    found = []
    for layers in (1, 2):
        config = LlamaConfig(**{**SIZES, "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        inject(model, adapters)
        for adapter in lora_layers(model).values():
            adapter.initialized = True
        model.train()
        x = torch.randn(2, 64, 64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            model.base_model(inputs_embeds=x, use_cache=False)[0].sum().backward()
        found.append(counter.get_total_flops())
    attention = 2 * 3 * 2 * 2 * 4 * 64 * 64 * 16  # two products, forward and twice backward, of whole squares
    assert counted == found[1] - found[0] - attention


def test_a_mixture_counts_as_the_dense_model_that_a_token_passes_through(scale: Any) -> None:
    dense = scale.dense(EXPERTS)
    assert (dense.intermediate_size, active_intermediate(EXPERTS)) == (192, 192)
    assert scale.dense(DENSE) is DENSE


def test_surgery_is_shared_and_takes_float32_where_float64_is_slow(scale: Any) -> None:
    run = scale.Run(DENSE, r=8, batch_size=2, length=64)
    alone, shared = (scale.surgery(run, scale.DEVICES["H100"], gpus, 0.0) for gpus in (1, 4))
    assert alone["eigenproblems"] / 4 <= shared["eigenproblems"] < alone["eigenproblems"] / 3
    slow, fast = (scale.decomposition(scale.DEVICES[name], (4096, 11008), 64) for name in ("4090", "H100"))
    assert fast < slow < 10 * fast  # 52 times in float64
