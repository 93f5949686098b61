"""Every mixture of experts that transformers' causal language models have: start, training and exports of adapters."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import VOCABULARY, small_config
from peft import PeftModel
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from milora_lightning import LoRAConfig, export_peft, initialize, inject, load_peft, lora_layers
from milora_lightning.adapters.experts import LoRAExperts
from milora_lightning.export.merging import merge_adapters
from milora_lightning.utils.errors import InvalidInputError

CLASSES: dict[str, type[PretrainedConfig]] = {config.__name__: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}
FAMILIES = (
    *("AXK1", "AXK2", "Afmoe", "AriaText", "Beam", "Cohere2Moe", "DeepseekV2", "DeepseekV3"),
    *("DeepseekV32", "DeepseekV4", "Dots1", "Dots3NoteText", "Ernie4_5_Moe", "ExaoneMoe", "FlexOlmo"),
    *("Gemma4Text", "Glm4Moe", "Glm4MoeLite", "GlmMoeDsa", "GptOss", "GraniteMoe", "GraniteMoeHybrid"),
    *("GraniteMoeSWA", "GraniteMoeShared", "HYV3", "HYV4", "HunYuanMoEV1", "Inkling2Text", "InklingText"),
    *("Jamba", "JetMoe", "KimiLinear", "Kolibri1", "Laguna", "Lfm2Moe", "Llama4", "Llama4Text", "LongcatFlash"),
    *("Mellum", "MiMoV2Flash", "MiniMax", "MiniMaxM2", "MiniMaxM3VLText", "Mixtral", "NemotronH", "Olmoe"),
    *("Phimoe", "Qwen2Moe", "Qwen3Moe", "Qwen3Next", "Qwen3_5Moe", "Qwen3_5MoeText", "Qwen4Exp", "Qwen4ExpText"),
    *("SolarOpen", "Zaya"),
)
"""Classes of configurations without ``Config``; docs/experts.md names them."""

LEFT_OUT = {
    "BailingHybrid": "its groups of experts do not fit four of them",
    "Flint": "its small configuration has no experts",
    "Dbrx": "its attention's configuration lacks rope_theta, which the model asks for; its experts are 2-D parameters",
    "Gemma4": "its text is a Gemma4Text",
    "Dots3Note": "its vision adapter has a size that no attribute tells; Dots3NoteText is the same language model",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "DeepseekV4": {"exclude_modules": ["o_a_proj"]},  # which multiplies groups of features
}
NOT_IN_PEFT = {
    "Jamba": "the model reads the weight of 'model.layers.0.mamba.dt_proj', ",
    "Inkling2Text": "does not read the tensor",  # PEFT renames tensors of its shared experts
    "Laguna": "does not read the tensor",
    "NemotronH": "incompatible with Mamba-based models",
}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Beam", "DeepseekV32", "GlmMoeDsa"), SPARSE),
    "DeepseekV3": {"first_k_dense_replace": 1},
    "Gemma4Text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "Lfm2Moe": {"num_dense_layers": 1},
}
"""What makes a small model have experts in its second layer."""
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_experts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if f"{name}Config" not in CLASSES and sys.version_info < (3, 11):
        pytest.skip("newer than the last transformers for Python 3.10")
    base = AutoModelForCausalLM.from_config(small_config(CLASSES[f"{name}Config"], **SIZES.get(name, {}))).eval()
    with torch.no_grad():
        start = logits(base)
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(r=2, **SETTINGS.get(name, {})))
    initialize(model, cache=False)
    adapters = lora_layers(model)
    expert = {n for n, p in base.named_parameters() if p.ndim == 3 and len(p) > 1 and "expert" in n and "bias" not in n}
    assert expert
    assert expert <= {n for n, layer in adapters.items() if isinstance(layer, LoRAExperts)}
    others = {n for n, m in base.named_modules() if isinstance(m, nn.Linear) and "router" not in n and "gate" not in n}
    weights = {**{n: base.get_submodule(n).weight.numel() for n in others if n != "lm_head"}}
    weights |= {n: p.numel() for n, p in base.named_parameters() if n in expert}
    assert sum(size for n, size in weights.items() if n in adapters) > 0.9 * sum(weights.values())

    for layer in adapters.values():
        layer.train()
    assert torch.equal(logits(model), start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(logits(model)[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    with torch.no_grad():
        tuned = logits(model.eval())
        if said := NOT_IN_PEFT.get(name):
            with pytest.raises(InvalidInputError, match=said):
                export_peft(model, tmp_path)
        else:
            export_peft(model, tmp_path)
            again = copy.deepcopy(base)
            load_peft(again, tmp_path)
            torch.testing.assert_close(logits(again.eval()), tuned, rtol=0, atol=1e-6)
            theirs = PeftModel.from_pretrained(base, tmp_path).eval()
            torch.testing.assert_close(logits(theirs), tuned, rtol=0, atol=1e-5)
        merge_adapters(model)
        torch.testing.assert_close(logits(model), tuned, rtol=0, atol=1e-5)
    assert (tuned - start).abs().max() > 1e-3


def test_no_family_is_missing() -> None:
    having = set()
    for config, kinds in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        kind = kinds[0] if isinstance(kinds, tuple) else kinds
        if re.search(r"class \w*Experts\(nn\.Module\)", inspect.getsource(sys.modules[kind.__module__])):
            having.add(config.__name__.removesuffix("Config"))
    assert having <= {*FAMILIES, *LEFT_OUT}
