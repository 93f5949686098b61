"""Settings of adapters in PEFT's configuration and back, and which tensors of a model are written in which dtype."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.export.merging import as_dtype, merged_state
from milora_lightning.export.peft_folder import as_ours
from milora_lightning.export.peft_format import PEFT_PREFIX, lora_config
from milora_lightning.export.peft_import import peft_config


def test_pefts_configuration_has_the_settings_of_training() -> None:
    model = tiny_model()
    layers = inject(model, LoRAConfig(r=4, lora_dropout=0.25, target_modules=["q_proj", "v_proj"]))
    ranks, alphas = dict.fromkeys(layers, 4), dict.fromkeys(layers, 8.0)
    odd = next(iter(layers))
    ranks[odd], alphas[odd] = 2, 2.5
    found = lora_config(model, ranks, alphas, ["norm"])
    assert (found.r, found.lora_alpha, found.lora_dropout) == (4, 8, 0.25)
    assert isinstance(found.lora_alpha, int)
    assert (found.rank_pattern, found.alpha_pattern) == ({odd: 2}, {odd: 2.5})
    assert found.target_modules == {"q_proj", "v_proj"}
    assert (found.modules_to_save, found.task_type, found.inference_mode) == (["norm"], "CAUSAL_LM", True)


@pytest.mark.parametrize("rslora", [False, True])
def test_ours_has_the_settings_of_pefts(rslora: bool) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.3, alpha_pattern={"b.v": 2.5}, rank_pattern={"a.q": 2}, use_rslora=rslora
    )
    ranks = {"a.q": 2, "a.v": 4, "b.q": 4, "b.v": 4}
    tensors = {f"{PEFT_PREFIX}{n}.lora_A.weight": torch.zeros(r, 8) for n, r in ranks.items()}
    tensors |= {f"{PEFT_PREFIX}{n}.lora_B.weight": torch.zeros(8, r) for n, r in ranks.items()}
    found = as_ours(config, {**tensors, f"{PEFT_PREFIX}norm.weight": torch.zeros(8)})
    assert (found.lora_dropout, found.init) == (0.3, "lora")
    assert found.modules_to_save == ("norm",)
    assert sorted(found.target_modules) == sorted(ranks)
    for name, rank in ranks.items():
        alpha = 2.5 if name == "b.v" else 6
        assert found.rank(name) == rank
        assert found.scale(name) == pytest.approx(alpha / math.sqrt(rank) if rslora else alpha / rank)


def test_the_tensors_that_are_asked_for_keep_what_is_no_floating_point_number() -> None:
    model = tiny_model()
    model.register_buffer("counts", torch.arange(300))
    inject(model, LoRAConfig(r=2))
    initialize(model)
    whole, _ = merged_state(model, torch.bfloat16)
    assert torch.equal(whole["counts"], torch.arange(300))
    assert {tensor.dtype for name, tensor in whole.items() if name != "counts"} == {torch.bfloat16}
    parts = [merged_state(model, torch.bfloat16, (prefix,))[0] for prefix in ("model.layers.0.", "model.layers.1.")]
    assert {n for part in parts for n in part} == {n for n in whole if n.startswith("model.layers.")}
    assert all(torch.equal(value, whole[name]) for part in parts for name, value in part.items())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_models_are_written_in_any_floating_point_dtype(name: str) -> None:
    assert as_dtype(name) is as_dtype(getattr(torch, name)) is getattr(torch, name)
    assert as_dtype(None) is None
    wrong: Any
    for wrong in ("int8", "fp32", "half precision", torch.int64):
        with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
            as_dtype(wrong)


def test_a_layer_whose_name_ends_in_anothers_keeps_its_own_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def base() -> nn.ModuleDict:
        block = nn.ModuleDict({"fc": nn.Linear(8, 8), "up": nn.Linear(8, 8)})
        return nn.ModuleDict({"fc": nn.Linear(8, 8), "block": block})

    peft = get_peft_model(base(), LoraConfig(r=4, lora_alpha=4, target_modules=["fc", "up"], rank_pattern={"^fc": 2}))
    ranks = {name: layer.r["default"] for name, layer in peft.base_model.model.named_modules() if hasattr(layer, "r")}
    assert ranks == {"fc": 2, "block.fc": 4, "block.up": 4}
    peft.save_pretrained(tmp_path)
    config = peft_config(tmp_path)
    assert {name: config.rank(name) for name in ranks} == ranks
    assert {config.scale(name) for name in ("block.fc", "block.up")} == {1.0}
