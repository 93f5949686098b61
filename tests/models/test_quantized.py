"""The base that `model.quantization` makes: its start, its factors, its checkpoints and its exports."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model, tiny_model, write_examples
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from milora_lightning import CausalLMModule, LoRAConfig, MiLoRAInit, initialize, inject, load_peft, lora_layers
from milora_lightning.checkpoint.fingerprint import check_base, fingerprint, quantization_of, unquantized
from milora_lightning.checkpoint.io import CheckpointError
from milora_lightning.cli.main import main
from milora_lightning.models.files import UnusableModelError
from milora_lightning.models.pretrained import load_causal_lm

pytest.importorskip("bitsandbytes")
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
WAYS = ["nf4", "fp4", "int8"]


def factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    inject(model, LoRAConfig(r=4))
    initialize(model)
    return {name: layer.lora_B @ layer.lora_A for name, layer in lora_layers(model).items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # whose files hold transposed weights, many of them square
@pytest.mark.parametrize("way", WAYS)
def test_start_is_the_quantized_model_and_factors_are_the_unquantized_weights(
    way: Any, kind: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "base", kind)
    model = load_causal_lm(str(tmp_path / "base"), quantization=way)
    full = load_causal_lm(str(tmp_path / "base"))
    assert model.get_output_embeddings().weight.dtype == torch.float32
    # Which some CPUs let bitsandbytes repack when a model evaluates: nothing could be initialized from them then.
    assert not any(getattr(child, "support_avx512bf16_for_cpu", False) for child in model.modules())
    with torch.no_grad():
        before = model(IDS).logits
        assert not torch.equal(before, full(IDS).logits)  # it is quantized
        here, there = factors(model), factors(full)
        assert torch.equal(model(IDS).logits, before)
    assert here.keys() == there.keys()
    for name, product in there.items():
        assert (here[name] - product).norm() <= 1e-5 * product.norm(), name


@pytest.mark.filterwarnings("ignore")
def test_experts_stay_as_they_are_beside_quantized_layers_and_have_adapters(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "qwen3_moe")
    with pytest.warns(UserWarning, match=r"the experts of this mixture.* stay in float32 and take 7\.37e-05 GB"):
        model = load_causal_lm(str(tmp_path / "base"), "float32", quantization="nf4")
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        before = model(IDS).logits
        started = factors(model)
        assert torch.equal(model(IDS).logits, before)
    assert sum("experts" in name for name in started) == 4


def test_names_that_the_model_has_not_lead_to_the_dequantized_weight(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base", "llama")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)
    tensors = load_file(folder / "model.safetensors")
    model = load_causal_lm(str(folder), quantization="nf4")
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, key: torch.randn_like(tensors[key])}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="is not what it was quantized from"):
        other = factors(model)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="do not have 14 of the 14 quantized weights"):
        model = load_causal_lm(str(folder), quantization="nf4")
    product = factors(model)[key.removesuffix(".weight")]
    assert torch.equal(product, other[key.removesuffix(".weight")])


def test_fingerprint_is_of_the_unquantized_base_and_tells_how_it_was_quantized(tmp_path: Path) -> None:
    base = str(save_tiny_model(tmp_path / "base", "llama"))
    prints = {
        way: fingerprint(load_causal_lm(base, "bfloat16", None, way).requires_grad_(False))
        for way in ("nf4", "int8", None)
    }
    assert prints["nf4"] == fingerprint(load_causal_lm(base, "bfloat16", None, "nf4").requires_grad_(False))
    assert unquantized(prints["nf4"]) == unquantized(prints["int8"]) == prints[None]
    assert [quantization_of(value) for value in prints.values()] == ["nf4", "int8", None]
    with pytest.raises(CheckpointError, match="with quantization: nf4, and this one has int8"):
        check_base(prints["nf4"], prints["int8"])
    torch.manual_seed(1)
    changed = tiny_model()
    with torch.no_grad():
        changed.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    changed.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"1 of \d+ frozen weights differ"):
        check_base(prints["nf4"], fingerprint(load_causal_lm(base, "bfloat16", None, "nf4").requires_grad_(False)))


@pytest.mark.slow
def test_command_line_trains_resumes_tests_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base", "llama")
    write_examples(tmp_path / "rows.jsonl", 24)
    options = ["--config", "milora.yaml", "--config", "qlora.yaml", "--model.name_or_path", "base"]
    options += ["--data.source", "milora_lightning.data.Files", "--data.source.train", "rows.jsonl"]
    options += [
        "--data.source.validation",
        "rows.jsonl",
        "--data.source.test",
        "rows.jsonl",
        "--trainer.logger",
        "false",
        "--model.dtype",
        "float32",
    ]
    options += ["--trainer.enable_progress_bar", "false", "--adapter.r", "4", "--model.max_new_tokens", "4"]
    options += ["--data.num_generation_examples", "0", "--data.num_test_generation_examples", "0"]
    options += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    options += ["--model.attn_implementation", "eager", "--trainer.accelerator", "cpu"]
    eight_bits = ["--model.optimizer", "bitsandbytes.optim.AdamW8bit", "--model.optimizer.lr", "1e-3"]
    eight_bits += ["--model.optimizer.min_8bit_size", "16"]  # smaller parameters have states of 32 bits
    main(["fit", *options, *eight_bits, "--trainer.max_epochs", "1"])
    cli = main(["fit", *options, *eight_bits, "--trainer.max_epochs", "2", "--ckpt_path", "runs/milora/last.ckpt"])
    assert cli.trainer.global_step == 2
    states = cli.trainer.optimizers[0].state.values()
    assert all(state["state1"].dtype == torch.uint8 for state in states)
    trained = cli.model.eval()
    with pytest.raises(SystemExit, match="with quantization: nf4, and this one has int8"):
        main(["test", *options, "--ckpt_path", "runs/milora/last.ckpt", "--model.quantization", "int8"])
    loaded = CausalLMModule.load_from_checkpoint("runs/milora/last.ckpt", map_location="cpu").eval()
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, trained.model(IDS).logits)
    main(["export", "--ckpt_path", "runs/milora/last.ckpt", "--output", "merged", "--format", "merged"])
    main(["export", "--ckpt_path", "runs/milora/last.ckpt", "--output", "peft"])
    merged, base = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "base"))
    for name, layer in lora_layers(trained.model).items():
        difference = merged[f"{name}.weight"] - base[f"{name}.weight"]
        torch.testing.assert_close(difference, layer.delta_weight(), rtol=1e-4, atol=1e-6)
    on_full = CausalLMModule("base")
    on_full.configure_model()
    load_peft(on_full, "peft")
    whole = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        torch.testing.assert_close(on_full.model.eval()(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = str(save_tiny_model(tmp_path / "base", "llama"))
    load_causal_lm(base, quantization="nf4").save_pretrained(tmp_path / "codes")
    with pytest.raises(UnusableModelError, match="are quantized already"):
        load_causal_lm(str(tmp_path / "codes"), quantization="nf4")
    module = CausalLMModule(base, quantization="nf4")
    with pytest.raises(ValueError, match="cannot be trained themselves"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(init="full")]).fit(module, [{}])
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match='pip install "milora-lightning'):
            load_causal_lm(base, quantization="nf4")


def test_nothing_is_said_of_a_base_whose_weights_are_all_found(tmp_path: Path) -> None:
    base = str(save_tiny_model(tmp_path / "base", "llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        factors(load_causal_lm(base, quantization="nf4"))
