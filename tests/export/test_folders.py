"""Exports open in stock PEFT and transformers, and compute what the live model does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.callback_modules import LanguageModel
from helpers.checkpoints import train
from helpers.exports import IDS, logits, tuned
from helpers.models import TINY_CONFIGS, quiet_trainer, save_tiny_model, tiny_model
from helpers.modules import data, module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from milora_lightning import (
    AdapterExport,
    CheckpointError,
    LoRAConfig,
    MiLoRAInit,
    adapters_disabled,
    export_merged,
    export_peft,
    initialize,
    inject,
    load_peft,
    lora_layers,
)
from milora_lightning.cli.main import main
from milora_lightning.export.peft_import import peft_config

TOLERANCE = {torch.float32: {"rtol": 0, "atol": 1e-5}, torch.bfloat16: {"rtol": 0.05, "atol": 0.05}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt"])
@pytest.mark.parametrize("init", ["milora", "lora"])
def test_peft_transformers_merged_and_live_agree(kind: str, init: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tuned(tmp_path / "base", kind, dtype, init=init)
    live = logits(model)
    export_peft(model, tmp_path / "peft")
    export_merged(model, tmp_path / "merged")
    assert torch.equal(logits(model), live)  # exporting changes nothing

    def base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)

    stock = PeftModel.from_pretrained(base(), tmp_path / "peft")
    native = base()
    native.load_adapter(str(tmp_path / "peft"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    for opened in (stock, native, merged):
        torch.testing.assert_close(logits(opened), live, **TOLERANCE[dtype])
    assert merged.dtype == dtype
    assert (logits(base()) - live).abs().max() > 0.1
    generated = [
        m.generate(input_ids=IDS[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
        for m in (model, stock, merged)
    ]
    if dtype == torch.float32:
        assert all(torch.equal(tokens, generated[0]) for tokens in generated)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == (4 if init == "lora" else 8)
    assert config["lora_alpha"] / config["r"] == 1.5
    assert {p.suffix for p in (tmp_path / "peft").iterdir()} == {".json", ".safetensors", ".md"}
    assert (tmp_path / "merged" / "generation_config.json").is_file()


def test_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    model = tuned(tmp_path / "base", dtype=torch.bfloat16)
    export_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    for name, layer in lora_layers(model).items():
        exact = layer.base_layer.weight.double() + layer.delta_weight().double()
        assert torch.equal(merged.get_submodule(name).weight, exact.to(torch.bfloat16))


def test_compression_reports_the_energy_it_loses(tmp_path: Path) -> None:
    model = tuned(tmp_path / "base")
    lost = export_peft(model, tmp_path / "small", rank=3)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "small")
    error = energy = 0.0
    for name, layer in lora_layers(model).items():
        peft_layer = opened.base_model.model.get_submodule(name)
        delta = layer.delta_weight().double()
        S = torch.linalg.svdvals(delta)
        error += S[3:].square().sum().item()
        energy += S.square().sum().item()
        kept = peft_layer.get_delta_weight("default").double()
        assert (delta - kept).square().sum().item() == pytest.approx(S[3:].square().sum().item(), rel=1e-3)
    assert 0 < lost < 1
    assert lost == pytest.approx(error / energy, rel=1e-6)
    assert export_peft(model, tmp_path / "full", rank=8) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="rank=9 is more than the adapters' 8"):
        export_peft(model, tmp_path / "large", rank=9)
    assert not (tmp_path / "large").exists()


def test_an_adapter_that_peft_reads_on_some_layers_only(tmp_path: Path) -> None:
    model = tuned(tmp_path / "base", target_modules=r"model\.layers\.1\..*q_proj")
    export_peft(model, tmp_path / "peft")
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-5)


def test_card_and_tokenizer(tmp_path: Path) -> None:
    model_folder = save_tiny_model(tmp_path / "base", "llama")
    lm = module(model_folder)
    export = AdapterExport(str(tmp_path / "out"), format="merged")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[MiLoRAInit(r=4), export])
    trainer.fit(lm, data(tmp_path, model_folder))
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(model_folder) in card
    assert "r = 4" in card
    (trained_on,) = [line for line in card.splitlines() if line.startswith("Trained on: ")]
    assert trained_on.startswith("Trained on: `Files; locations: train ")
    assert not set("{}'=()") & set(trained_on.replace(str(tmp_path), ""))  # words, and no Python
    assert f"| val_loss | {trainer.callback_metrics['val_loss'].item():.4g} |" in card
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
    with pytest.raises(FileExistsError, match="something at"):  # at the start of the next run, not at its end
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[MiLoRAInit(r=4), export]).fit(lm, data(tmp_path, model_folder))


def test_export_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_folder = save_tiny_model(tmp_path / "base", "llama")
    lm = module(model_folder)
    path = train(tmp_path, lm, data(tmp_path, model_folder))
    main(["export", "--ckpt_path", str(path), "--output", str(tmp_path / "peft"), "--rank", "3"])
    assert "Rank 3 keeps" in capsys.readouterr().out
    main(["export", "--ckpt_path", str(path), "--output", str(tmp_path / "merged"), "--format", "merged"])
    assert "Rounding" not in capsys.readouterr().out
    half = ["--output", str(tmp_path / "half"), "--format", "merged", "--dtype", "bfloat16"]
    main(["export", "--ckpt_path", str(path), *half])
    assert "dtype float32 keeps all" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(SystemExit, match="Adapters are always float32"):
        main(["export", "--ckpt_path", str(path), "--output", str(tmp_path / "other"), "--dtype", "bfloat16"])
    assert "train.jsonl" in (tmp_path / "merged" / "README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(lm.model), rtol=0, atol=1e-5)
    with pytest.raises(SystemExit, match="something at"):
        main(["export", "--ckpt_path", str(path), "--output", str(tmp_path / "peft")])
    with pytest.raises(SystemExit, match="no checkpoint"):
        main(["export", "--ckpt_path", "absent.ckpt", "--output", str(tmp_path / "other")])


def test_export_without_adapters_is_refused(tmp_path: Path) -> None:
    for export in (export_peft, export_merged):
        with pytest.raises(ValueError, match="no adapters to export"):
            export(tiny_model(), tmp_path / "out")
        with pytest.raises(ValueError, match="no Hugging Face model"):
            export(nn.Linear(2, 2), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_format_would_lose_is_refused(tmp_path: Path) -> None:
    whole = tuned(tmp_path / "base", target_modules=["q_proj"])
    whole.model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"'model' trains a parameter of its own .*PEFT cannot represent"):
        export_peft(whole, tmp_path / "out")
    export_merged(whole, tmp_path / "merged")
    outside = nn.ModuleDict({"lm": tiny_model(), "head": nn.Linear(8, 8)})
    inject(outside, LoRAConfig(r=4))
    for export in (export_peft, export_merged):
        with pytest.raises(ValueError, match="'head' has an adapter and is outside"):
            export(outside, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_of_our_own_export_is_the_same_function(tmp_path: Path) -> None:
    model = tuned(tmp_path / "base")
    export_peft(model, tmp_path / "peft")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = load_peft(again, tmp_path / "peft")
    assert (config.r, config.init) == (8, "lora")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    export_merged(again, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


def foreign_adapter(folder: Path, **options: Any) -> PeftModel:
    torch.manual_seed(2)
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    config = LoraConfig(**{**defaults, **options})
    model = get_peft_model(tiny_model(), config)
    model.save_pretrained(folder)
    return model


def test_training_continues_from_an_adapter_of_pefts(tmp_path: Path) -> None:
    foreign = foreign_adapter(tmp_path / "foreign")
    model = tiny_model()
    load_peft(model, tmp_path / "foreign")
    torch.testing.assert_close(logits(model), logits(foreign), rtol=0, atol=1e-5)
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(tiny_model()))
    start = copy.deepcopy(model.state_dict())
    model.train()(IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {f"{n}.{f}" for n in lora_layers(model) for f in ("lora_A", "lora_B")}


def test_callback_starts_from_an_exported_adapter(tmp_path: Path) -> None:
    model_folder = save_tiny_model(tmp_path / "base", "llama")
    first = module(model_folder)
    train(tmp_path, first, data(tmp_path, model_folder))
    export_peft(first, tmp_path / "peft")
    second = module(model_folder)
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[MiLoRAInit(start_from=str(tmp_path / "peft"))])
    trainer.validate(second, data(tmp_path, model_folder), verbose=False)
    torch.testing.assert_close(logits(second.model), logits(first.model), rtol=0, atol=1e-5)
    trainer.fit(second, data(tmp_path, model_folder))
    assert (logits(second.model) - logits(first.model)).abs().max() > 0
    assert {layer.r for layer in lora_layers(second).values()} == {8}


def test_adapters_that_cannot_be_continued_are_refused(tmp_path: Path) -> None:
    foreign_adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(CheckpointError, match="uses use_dora"):
        peft_config(tmp_path / "dora")
    foreign_adapter(tmp_path / "alora", alora_invocation_tokens=[5, 6])
    with pytest.raises(CheckpointError, match="uses alora_invocation_tokens"):
        peft_config(tmp_path / "alora")
    foreign_adapter(tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(CheckpointError, match=r"uses init_lora_weights='pissa'.*merge_and_unload"):
        peft_config(tmp_path / "pissa")
    with pytest.raises(CheckpointError, match="not a PEFT adapter folder"):
        peft_config(tmp_path / "absent")
    foreign_adapter(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="for other layers than this model's"):
        load_peft(nn.Sequential(tiny_model("qwen2"), nn.Linear(2, 2))[0].model, tmp_path / "foreign")


def test_other_heads_small_matrices_and_shared_layers(tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_config(copy.deepcopy(TINY_CONFIGS["llama"]))
    classifier.config.pad_token_id = 0
    classifier.save_pretrained(tmp_path / "classifier")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    inject(classifier, LoRAConfig(r=12, target_modules=["q_proj", "k_proj"]))
    initialize(classifier)
    with torch.no_grad():
        for layer in lora_layers(classifier).values():
            layer.lora_B.add_(0.1)
    for rank in (None, 20):  # more than k_proj's 16 singular values
        export_peft(classifier, tmp_path / f"peft{rank}", rank=rank)
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
        opened = PeftModel.from_pretrained(base, tmp_path / f"peft{rank}")
        with torch.no_grad():
            mask = torch.ones_like(IDS)
            theirs, ours = (m.eval()(IDS, attention_mask=mask).logits for m in (opened, classifier))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    shared = tiny_model()
    shared.model.layers[1].self_attn.q_proj = shared.model.layers[0].self_attn.q_proj
    inject(shared, LoRAConfig(r=4, target_modules=["q_proj"]))
    initialize(shared)
    with torch.no_grad():
        lora_layers(shared)["model.layers.0.self_attn.q_proj"].lora_B.add_(0.1)
    with pytest.raises(ValueError, match="used in several places"):
        export_peft(shared, tmp_path / "shared")
    export_merged(shared, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(shared), rtol=0, atol=1e-5)


def test_import_on_another_base_or_of_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    export_peft(tuned(tmp_path / "base"), tmp_path / "peft")
    other = tiny_model()
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    with pytest.raises(CheckpointError, match=r"another base model: 1 of .*'model.norm.weight'"):
        load_peft(other, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_peft(other, tmp_path / "peft")
    assert not lora_layers(other)
    assert all(p.requires_grad for p in other.parameters())


def test_a_model_with_peft_layers_is_refused_in_one_sentence(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"already carries PEFT layers.*get_peft_model"):
        inject(model, LoRAConfig(r=4))
    lm = LanguageModel()
    lm.lm = model
    with pytest.raises(ValueError, match=r"already carries PEFT layers.*get_peft_model"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(r=4)]).fit(lm)
