"""What ``attn_implementation: auto`` means, and that it computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers.models import TINY_CONFIGS
from helpers.small_models import VOCABULARY, small_config
from transformers import AutoModelForCausalLM

from milora_lightning.models import choosing_attention
from milora_lightning.models.attention import NAME as CAUSAL_BLOCKS
from milora_lightning.models.choosing_attention import choose_attention
from milora_lightning.models.loss import causal_lm_loss

CPU, CUDA, HALF = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
CHOSEN = [
    *("LlamaConfig", "MistralConfig", "MixtralConfig", "Qwen2Config", "Qwen3Config", "Qwen3MoeConfig", "GemmaConfig"),
    *("Gemma3TextConfig", "Phi3Config", "PhiConfig", "GPT2Config", "GPTNeoXConfig", "OPTConfig"),
    *("Olmo2Config", "GraniteConfig", "CohereConfig", "Cohere2Config", "Starcoder2Config", "DeepseekV3Config"),
    "SmolLM3Config",
]


@pytest.mark.parametrize("name", CHOSEN)
def test_on_cpus_the_loss_is_that_of_transformers_choice(name: str) -> None:
    config = small_config(getattr(transformers, name))
    choice = choose_attention(config, torch.float32, CPU)
    assert choice.name == CAUSAL_BLOCKS
    ids = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    losses = []
    for attention in (choice.name, None):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            losses.append(causal_lm_loss(model, ids, ids))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["gemma2", "GptOssConfig", "BloomConfig", "MptConfig", "T5GemmaConfig"])
def test_models_that_need_another_keep_theirs(name: str) -> None:
    """They cap scores, add sinks or biases, or compute attention in their own way."""
    config = TINY_CONFIGS[name] if name in TINY_CONFIGS else small_config(getattr(transformers, name))
    for device in (CPU, CUDA) if torch.cuda.is_available() else (CPU,):
        assert choose_attention(config, HALF, device).name in {None, "eager"}


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({}, "flash_attention_2", "whose package is installed"),
        ({"dtype": torch.float32}, None, "needs a half-precision model"),
        ({"capability": (7, 5)}, None, "compute capability 8.0"),
        ({"installed": (False, False)}, None, "needs the package flash-attn"),
        ({"installed": (False, True)}, None, "needs the package flash-attn"),
        ({"installed": (True, True), "capability": (9, 0)}, "flash_attention_3", "whose package is installed"),
        ({"head_dim": 512}, None, "no kernel for heads of 512 features"),
    ],
)
def test_on_gpus_flash_attention_where_it_fits(
    change: dict[str, Any], name: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, three = change.get("installed", (True, False))
    monkeypatch.setattr(choosing_attention, "is_flash_attn_2_available", lambda: two)
    monkeypatch.setattr(choosing_attention, "is_flash_attn_3_available", lambda: three)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: change.get("capability", (8, 0)))
    config = TINY_CONFIGS["llama"].__class__(**{**TINY_CONFIGS["llama"].to_dict(), "head_dim": change.get("head_dim")})
    choice = choose_attention(config, change.get("dtype", HALF), CUDA)
    assert choice.name == name
    assert reason in choice.in_words
