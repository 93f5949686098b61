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
from helpers.benchmarks import benchmark
from helpers.models import TINY_CONFIGS, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.models.loss import causal_lm_loss
from milora_lightning.models.memory import estimate, planned_model

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


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "all-linear"])
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
    difference = [kept(config_of(kind, layers), adapters, dtype, attention) for layers in (2, 4)]
    predicted = []
    for layers in (2, 4):
        config = config_of(kind, layers)
        model = planned_model(config, dtype, adapters)
        parts = estimate(model, config, BATCH, LENGTH, dropout=dropout, attention=attention).parts
        predicted += [part.size for part in parts if part.name == "activations kept"]
    assert predicted[1] - predicted[0] == pytest.approx(difference[1] - difference[0], rel=0.05)


def test_weights_gradients_and_states_are_counted_without_weights() -> None:
    config, adapters = config_of("llama", 2), LoRAConfig(8, target_modules=["q_proj"])
    model = planned_model(config, torch.bfloat16, adapters)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    sizes = {part.name: part.size for part in estimate(model, config, BATCH, LENGTH).parts}
    trained = 2 * 8 * (128 + 128)
    assert estimate(model, config, BATCH, LENGTH).trainable == trained
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
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
    assert predicted[1] - predicted[0] == pytest.approx(difference[1] - difference[0], rel=0.05)


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


RUN = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.utils.allocator import map_large_tensors
from milora_lightning.utils.process_memory import peak_resident, resident
from milora_lightning.models.loss import causal_lm_loss
from milora_lightning.models.memory import LOADED, estimate, planned_model

sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
config = LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=8000, pad_token_id=0)
adapters = LoRAConfig(16, lora_dropout=0.1)
checkpointing = sys.argv[1] == "True"
expected = estimate(
    planned_model(config, torch.float32, adapters), config, 8, 256, dropout=0.1,
    gradient_checkpointing=checkpointing, mapped=True
)
before = resident() + LOADED
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
inject(model, adapters)
initialize(model)
model.train()
if checkpointing:
    assert map_large_tensors()
    model.gradient_checkpointing_enable({"use_reentrant": False})
optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
for _ in range(2):
    ids = torch.randint(1, 8000, (8, 256))
    optimizer.zero_grad()
    causal_lm_loss(model, ids, ids).backward()
    optimizer.step()
print(before + expected.peak, peak_resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what a process has is read from Linux's /proc")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_run_is_estimated_within_15_percent(checkpointing: bool) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, str(checkpointing)], capture_output=True, text=True, check=True)
    estimated, measured = map(int, done.stdout.split()[-2:])
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_an_mlp_under_another_name_is_counted(kind: str) -> None:
    def peak(config: PretrainedConfig) -> int:
        return estimate(planned_model(config, torch.float32, LoRAConfig(r=4)), config, 2, 64).peak

    wider = TINY_CONFIGS[kind]
    setattr(wider, {"gpt2": "n_inner", "opt": "ffn_dim"}[kind], 512)
    assert peak(wider) > 1.2 * peak(TINY_CONFIGS[kind])


FIT = r"""
import contextlib, io, sys
from milora_lightning.cli.main import main
from milora_lightning.cli.commands.preview import preview
from milora_lightning.utils.process_memory import peak_resident
folder = sys.argv[1]
options = ["--config=milora.yaml", f"--model.name_or_path={folder}", "--model.dtype=float32",
    "--model.attn_implementation=sdpa", f"--data.source=Files", f"--data.source.train={folder}/examples.jsonl",
    "--data.source.validation_size=0", "--data.template=plain", "--data.max_length=1024", "--data.global_batch_size=2",
    "--data.num_generation_examples=0", "--trainer.max_steps=2", "--trainer.limit_val_batches=0",
    "--trainer.num_sanity_val_steps=0", "--trainer.callbacks=[]", "--trainer.enable_checkpointing=false",
    "--trainer.logger=false", f"--trainer.default_root_dir={folder}", f"--model.gradient_checkpointing={sys.argv[2]}"]
with contextlib.redirect_stdout(io.StringIO()) as text:
    preview(options, examples=0)
main(["fit", *options])
print(text.getvalue())
print("measured:", peak_resident() / 1e9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has is read from Linux's /proc")
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_preview_says_is_what_fit_takes(tmp_path: Path, checkpointing: bool) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=128, max_position_embeddings=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    row = json.dumps({"prompt": "Count.", "response": " ".join(map(str, range(900)))})
    (tmp_path / "examples.jsonl").write_text(f"{row}\n" * 4)
    command = [sys.executable, "-c", FIT, str(tmp_path), str(checkpointing).lower()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (estimated,) = (float(x) for x in re.findall(r"estimated: ([\d.]+) GB", done.stdout))
    (measured,) = (float(x) for x in re.findall(r"^measured: ([\d.]+)$", done.stdout, re.MULTILINE))
    assert estimated == pytest.approx(measured, rel=0.15)
    if checkpointing:
        return
    # negative control: without the activations it would be another number
    ((size, unit),) = re.findall(r"([\d.]+) (GB|MB)  activations kept", done.stdout)
    assert estimated - float(size) * {"GB": 1, "MB": 1e-3}[unit] < 0.85 * measured
