"""The estimate of memory against what autograd keeps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import benchmarks
from helpers.benchmarks import benchmark
from helpers.models import TINY_CONFIGS, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.models.loss import causal_lm_loss
from milora_lightning.models.memory import decomposition_size, estimate, planned_model

BATCH, LENGTH = 4, 128
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {"llama": (LlamaConfig, {}), "qwen3": (Qwen3Config, {"head_dim": 32})}


def config_of(kind: str, layers: int) -> PretrainedConfig:
    cls, more = CONFIGS[kind]
    return cls(**SIZES, **more, num_hidden_layers=layers, vocab_size=500, pad_token_id=0)


def kept(config: PretrainedConfig, adapters: LoRAConfig | None, dtype: torch.dtype, attention: str) -> int:
    """Return the bytes that autograd keeps for backward beside parameters."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if adapters is not None:
        inject(model, adapters)
        initialize(model)
    model.train()
    ids = torch.randint(1, 500, (BATCH, LENGTH))
    known = [*model.parameters(), *model.buffers(), ids]
    kept_for_backward = benchmark("cost").kept_for_backward
    return int(kept_for_backward(lambda: causal_lm_loss(model, ids, ids), known))


def estimated(config: PretrainedConfig, adapters: LoRAConfig | None, dtype: torch.dtype, **options: Any) -> int:
    model = planned_model(config, dtype, adapters)
    parts = estimate(model, config, BATCH, LENGTH, **options).parts
    return sum(part.size for part in parts if part.name == "activations kept")


@pytest.mark.parametrize(
    "targets", [["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], ["o_proj", "down_proj"], "all-linear"]
)
@pytest.mark.parametrize(
    ("kind", "dtype", "attention", "dropout"),
    [
        ("llama", torch.bfloat16, "sdpa", 0.0),
        ("llama", torch.bfloat16, "causal_blocks", 0.1),
        ("llama", torch.float32, "eager", 0.1),
        ("qwen3", torch.float32, "sdpa", 0.1),
        ("qwen3", torch.bfloat16, "eager", 0.0),
    ],
)
def test_activations_are_those_that_autograd_keeps(
    kind: str, dtype: torch.dtype, attention: str, dropout: float, targets: Any
) -> None:
    adapters = LoRAConfig(8, lora_dropout=dropout, target_modules=targets)
    few, many = (config_of(kind, layers) for layers in (2, 4))
    measured = kept(many, adapters, dtype, attention) - kept(few, adapters, dtype, attention)
    options = {"dropout": dropout, "attention": attention}
    found = estimated(many, adapters, dtype, **options) - estimated(few, adapters, dtype, **options)
    assert found == pytest.approx(measured, rel=0.01)


EXPERTS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "two of them": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}),
    "one of them": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 96}),
    "others shared": (Qwen2MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}),
    "of the MLP's size": (MixtralConfig, {"num_local_experts": 4}),
    "norms of all heads": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "an activation of its own": (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", EXPERTS)
def test_a_token_counts_for_the_experts_that_it_is_routed_to(kind: str, adapted: bool, dtype: torch.dtype) -> None:
    cls, more = EXPERTS[kind]
    sizes = {**SIZES, "vocab_size": 500, "pad_token_id": 0, "shared_expert_intermediate_size": 160, **more}
    few, many = (cls(**sizes, num_hidden_layers=layers) for layers in (1, 2))
    names = ["experts.gate_up_proj", "experts.down_proj"] if adapted else []
    adapters = LoRAConfig(8, target_modules=["q_proj", "v_proj"], target_parameters=names)
    attention = "eager" if cls is GptOssConfig else "sdpa"
    measured = kept(many, adapters, dtype, attention) - kept(few, adapters, dtype, attention)
    found = estimated(many, adapters, dtype, attention=attention) - estimated(few, adapters, dtype, attention=attention)
    assert found == pytest.approx(measured, rel=0.03)


def test_a_decomposition_of_most_triplets_takes_more_than_one_of_few() -> None:
    few, most = (
        estimate(planned_model(config, torch.float32, LoRAConfig(r)), config, BATCH, LENGTH)
        for config, r in ((config_of("llama", 2), 8), (config_of("llama", 2), 100))
    )
    threads = torch.get_num_threads()
    assert few.surgery == threads * decomposition_size((384, 128), "cpu", 8)
    assert most.surgery == threads * decomposition_size((384, 128), "cpu", 100) > 2 * few.surgery


def test_weights_gradients_and_states_are_counted_without_weights() -> None:
    config, adapters = config_of("llama", 2), LoRAConfig(8, target_modules=["q_proj"])
    model = planned_model(config, torch.bfloat16, adapters)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    sizes = {part.name: part.size for part in estimate(model, config, BATCH, LENGTH).parts}
    trained = 2 * 8 * (128 + 128)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found = estimate(model, config, BATCH, LENGTH)
    assert (found.trainable, found.total) == (trained, sum(p.numel() for p in plain.parameters()) + trained)
    assert sizes["frozen weights"] == pytest.approx(sum(p.nbytes for p in plain.parameters()), rel=0.01)
    assert sizes["adapters"] == 2 * 4 * trained  # with the initial factors
    assert (sizes["their gradients"], sizes["AdamW's state"]) == (4 * trained, 8 * trained)
    assert estimate(model, config, BATCH, LENGTH, optimizer="SGD").peak < estimate(model, config, BATCH, LENGTH).peak


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_full_fine_tuning_is_estimated_without_adapters(attention: str) -> None:
    difference = [kept(config_of("llama", layers), None, torch.float32, attention) for layers in (2, 4)]
    predicted = []
    for layers in (2, 4):
        config = config_of("llama", layers)
        model = planned_model(config, torch.float32, None)
        estimated = estimate(model, config, BATCH, LENGTH, attention=attention)
        sizes = {part.name: part.size for part in estimated.parts}
        predicted.append(sizes["activations kept"])
        weights = sum(p.nbytes for p in model.parameters())
        assert (sizes["weights that train"], sizes["AdamW's state"]) == (weights, 2 * weights)
        assert 4 * estimated.trainable == 4 * estimated.total == weights
    assert predicted[1] - predicted[0] == pytest.approx(difference[1] - difference[0], rel=0.01)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    config = config_of("llama", 8)
    model: nn.Module = planned_model(config, torch.bfloat16, LoRAConfig(8))
    whole, less = (
        {part.name: part.size for part in estimate(model, config, 4, 128, gradient_checkpointing=on).parts}
        for on in (False, True)
    )
    at_once = "computed at once"
    assert less["activations kept"] + less[at_once] < (whole["activations kept"] + whole[at_once]) / 3
    changed = ("activations kept", at_once, "between tensors")
    assert {k: v for k, v in whole.items() if k not in changed} == {k: v for k, v in less.items() if k not in changed}


def test_quantized_weights_take_their_codes_and_scales() -> None:
    config = config_of("llama", 2)
    model = planned_model(config, torch.bfloat16, LoRAConfig(8))
    sizes = [estimate(model, config, 4, 128, quantization=how).parts[0].size for how in (None, "int8", "nf4")]
    linear = 2 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 384)
    assert sizes[0] - sizes[1] == linear
    assert sizes[0] - sizes[2] == pytest.approx(linear * 1.4375)


def test_many_threads_decompose_small_weights_side_by_side_and_large_ones_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def surgery(size: int) -> int:
        config = LlamaConfig(hidden_size=size, intermediate_size=size, num_hidden_layers=1, vocab_size=8)
        return estimate(planned_model(config, torch.float32, LoRAConfig(8)), config, 1, 8).surgery

    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert surgery(1024) == 64 * 2 * 8 * 1024**2
    assert surgery(4096) == 3.5 * 8 * 4096**2  # as measured: benchmarks/results/two_cores.md


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peaks of three runs, in a folder; see ``helpers/peak_memory.py``."""
    if sys.platform != "linux":
        pytest.skip("what a process has is read from Linux's /proc")
    folder = tmp_path_factory.mktemp("peaks")
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=128, max_position_embeddings=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    row = json.dumps({"prompt": "Count.", "response": " ".join(map(str, range(900)))})
    (folder / "examples.jsonl").write_text(f"{row}\n" * 4)
    command = [sys.executable, str(Path(benchmarks.__file__).with_name("peak_memory.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_peak_of_a_loop_is_estimated_within_10_percent(peaks: Path) -> None:
    estimated, measured = json.loads((peaks / "loop.json").read_text())
    assert estimated == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_an_mlp_under_another_name_is_counted(kind: str) -> None:
    def peak(config: PretrainedConfig) -> int:
        return estimate(planned_model(config, torch.float32, LoRAConfig(r=4)), config, 2, 64).peak

    wider = TINY_CONFIGS[kind]
    setattr(wider, {"gpt2": "n_inner", "opt": "ffn_dim"}[kind], 512)
    assert peak(wider) > 1.2 * peak(TINY_CONFIGS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_preview_says_is_what_fit_takes(peaks: Path, checkpointing: bool) -> None:
    said, peak = json.loads((peaks / f"command-{checkpointing}.json").read_text())
    measured = peak / 1e9
    (estimated,) = (float(x) for x in re.findall(r"estimated: ([\d.]+) GB", said))
    assert estimated == pytest.approx(measured, rel=0.1)
    if checkpointing:
        return
    # negative control: without the activations it would be another number
    ((size, unit),) = re.findall(r"([\d.]+) (GB|MB)  activations kept", said)
    assert estimated - float(size) * {"GB": 1, "MB": 1e-3}[unit] < 0.88 * measured
