"""A model with fused projections, and the same model with separate ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.adapters.injection import lora_layers

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
PARTS: dict[str, Any] = {"qkv_proj": [16, 8, 8], "gate_up_proj": 2}
NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def phi3(dtype: torch.dtype = torch.float32) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SIZES)).to(dtype)


def separate(fused: Phi3ForCausalLM) -> LlamaForCausalLM:
    """The model that computes the same with a layer for each projection."""
    state: dict[str, Tensor] = {}
    for key, value in fused.state_dict().items():
        layer = key.split(".")[-2]
        rows = {"qkv_proj": [16, 8, 8], "gate_up_proj": [24, 24]}.get(layer)
        parts = value.split(rows) if rows else [value]
        state.update({key.replace(layer, name): p for name, p in zip(NAMES.get(layer, (layer,)), parts, strict=True)})
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=fused.config.rms_norm_eps))
    model.load_state_dict(state)
    return model


def adapted(model: Any, parts: dict[str, Any] | None = None, **options: Any) -> Any:
    inject(model, LoRAConfig(**{"r": 3, "lora_alpha": 5.0, "fused_parts": parts or {}, **options}))
    initialize(model)
    return model


def by_projection(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of each projection, A and B, by its name in the model with separate ones."""
    found = {}
    for name, layer in lora_layers(model).items():
        sizes, last = layer.parts or (layer.out_features,), name.rpartition(".")[2]
        names = NAMES[last] if layer.parts else (last,)
        pairs = zip(layer.lora_A.chunk(len(sizes)), layer.lora_B.split(list(sizes)), strict=True)
        found.update({name.replace(last, own): pair for own, pair in zip(names, pairs, strict=True)})
    return found


def trained(model: Any, steps: int = 4) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
