"""Two ranks compute what one does. Models that cannot be split are refused before anything is split."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.forked import run_ranks
from helpers.models import tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from milora_lightning import LoRAConfig, initialize, inject, lora_layers
from milora_lightning.models.tensor_parallel import parallelize, planned


def adapted(kind: str = "llama", **options: Any) -> PreTrainedModel:
    model = tiny_model(kind)
    inject(model, LoRAConfig(r=4, **options))
    return model


def refusal(model: PreTrainedModel, ranks: int) -> str:
    before = list(model.parameters())
    mesh: Any = SimpleNamespace(size=lambda: ranks)
    with pytest.raises(ValueError, match="tensor_parallel_size") as raised:
        parallelize(model, mesh)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    return str(raised.value)


def test_a_plan_names_the_layers_of_each_decoder_layer() -> None:
    model = adapted()
    styles = planned(model)
    assert set(lora_layers(model).values()) == set(styles)
    assert [styles[layer] for layer in model.model.layers[1].mlp.children() if layer in styles] == [
        "colwise",
        "colwise",
        "rowwise",
    ]


def test_models_without_a_plan_are_refused() -> None:
    assert "transformers has no plan for tensor parallelism of GPT2LMHeadModel" in refusal(adapted("gpt2"), 2)


def test_plans_that_split_fused_weights_are_refused() -> None:
    model = adapted()
    model.config.base_model_tp_plan = {"layers.*.self_attn.qkv_proj": "packed_colwise"}
    assert "splits layers.*.self_attn.qkv_proj by 'packed_colwise'" in refusal(model, 2)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_are_refused_with_and_without_adapters(kind: str) -> None:
    """What is refused first has to lead to what works: leaving the experts out would not."""
    said = refusal(adapted(kind), 2)
    assert "'model.layers.0.mlp.experts.gate_up_proj' holds experts, which tensor parallelism does not split" in said
    assert "leave" not in said
    assert "experts" in refusal(adapted(kind, exclude_modules=["experts"]), 2)


def test_ranks_have_to_divide_heads_and_sizes() -> None:
    assert "does not divide the 2 num_key_value_heads of LlamaForCausalLM" in refusal(adapted(), 4)
    model = adapted()
    model.config.num_attention_heads = model.config.num_key_value_heads = 6
    assert "is 3, which does not divide the 32 rows of layer 'model.layers.0.self_attn.q_proj'" in refusal(model, 3)


def test_what_trains_in_full_is_refused() -> None:
    assert "'model.norm.weight' trains besides the adapters" in refusal(adapted(modules_to_save=("model.norm",)), 2)


def test_layers_that_are_more_than_a_product_are_refused() -> None:
    model = adapted()
    model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(lambda layer, args, output: output + 1)
    assert "'model.layers.0.mlp.up_proj' (Linear) is more than the product" in refusal(model, 2)


def test_layers_without_an_adapter_are_split_too() -> None:
    model = adapted(target_modules=("q_proj",))
    styles = planned(model)
    assert len(styles) == 14
    assert sum(isinstance(layer, nn.Linear) for layer in styles) == 12


def trained(kind: str, **options: Any) -> PreTrainedModel:
    """A model whose adapters have left their start, each by its own noise."""
    model = adapted(kind, **options)
    initialize(model, cache=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def split_in_two() -> None:
    dist.init_process_group("gloo")
    ids = torch.arange(12).view(2, 6)
    some = {"target_modules": ("q_proj", "down_proj", "lm_head"), "init": "pissa"}
    for kind, options in (("llama", some), ("qwen2", {"lora_dropout": 0.5})):  # the second has biases
        whole, split = (trained(kind, **options) for _ in range(2))
        parallelize(split, init_device_mesh("cpu", (2,)))
        for enabled in (True, False):
            for model in (whole, split):
                for layer in lora_layers(model).values():
                    layer.enabled = enabled
            outputs = []
            for model in (whole, split):
                torch.manual_seed(0)  # the same entries are left out
                outputs.append(model(ids).logits)
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
            if enabled:
                updated = outputs[0]
                for logits in outputs:
                    logits.square().mean().backward()
        assert (updated - outputs[0]).abs().max() > 1e-2
        for (name, layer), own in zip(lora_layers(whole).items(), lora_layers(split).values(), strict=True):
            for factor in ("lora_A", "lora_B"):
                wanted, found = (getattr(each, factor).grad for each in (layer, own))
                torch.testing.assert_close(found.full_tensor(), wanted, rtol=1e-3, atol=1e-6, msg=f"{name}.{factor}")


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    statuses = run_ranks(split_in_two, tmp_path, limit=120)
    assert statuses == [0, 0], (tmp_path / "output0.txt").read_text()[-3000:]
