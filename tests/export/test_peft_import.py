"""Adapters of PEFT's, of every kind that plain LoRA layers can hold, compute here what they do there, and train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import logits, move, tuned
from helpers.models import quiet_trainer, save_tiny_model, tiny_model
from helpers.modules import data, module
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from milora_lightning import CheckpointError, MiLoRAInit, export_peft, load_adapter, load_peft, lora_layers
from milora_lightning.export.peft_import import peft_config
from milora_lightning.models.pretrained import load_causal_lm


def foreign(folder: Path, model: PreTrainedModel, **options: Any) -> PeftModel:
    """An adapter that PEFT has moved away from its start and saved."""
    torch.manual_seed(2)
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **options}))
    move(peft)
    peft.save_pretrained(folder)
    return peft.eval()


KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 8, r"layers\.0\.mlp.*": 1}, "target_modules": "all-linear"},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3, "up": 1}, "target_modules": ["q_proj", "up_proj"]},
    "both": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"1.self_attn.q_proj": 3}},
    "more than the layer's rank": {"r": 40},
    "all-linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r"model\.layers\.\d\..*(q|v)_proj"},
    "exclude_modules": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "a layer by its weight": {"target_parameters": ["lm_head.weight"]},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_pefts_is_the_same_function_here_and_again_there(kind: str, tmp_path: Path) -> None:
    theirs = logits(foreign(tmp_path / "theirs", tiny_model(), **KINDS[kind]))
    model = tiny_model()
    load_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-5)
    assert (logits(tiny_model()) - theirs).abs().max() > 1e-3
    export_peft(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), theirs, rtol=0, atol=1e-5)
    twice = tiny_model()
    load_peft(twice, tmp_path / "ours")
    torch.testing.assert_close(logits(twice), theirs, rtol=0, atol=1e-5)
    moved = {n for n, p in model.named_parameters() if p.requires_grad}
    (model(torch.arange(8)[None]).logits ** 2).sum().backward()
    assert moved == {n for n, p in model.named_parameters() if p.grad is not None}


def test_conv1d_and_a_classifier_with_its_head(tmp_path: Path) -> None:
    peft = foreign(tmp_path / "gpt2", tiny_model("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)
    model = tiny_model("gpt2")
    load_peft(model, tmp_path / "gpt2")
    torch.testing.assert_close(logits(model), logits(peft), rtol=0, atol=1e-5)

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}

    def classifier() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=128, num_labels=3, **sizes))

    peft = foreign(tmp_path / "bert", classifier(), target_modules=["query"], task_type="SEQ_CLS")
    model = classifier()
    config = load_peft(model, tmp_path / "bert")
    torch.testing.assert_close(logits(model), logits(peft), rtol=0, atol=1e-5)
    assert config.modules_to_save == ("classifier",)
    assert model.classifier.weight.requires_grad


def test_the_older_file_is_read_without_running_what_is_in_it(tmp_path: Path) -> None:
    theirs = logits(foreign(tmp_path / "old", tiny_model()))
    file = tmp_path / "old" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    model = tiny_model()
    load_peft(model, tmp_path / "old")
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-5)
    torch.save({"evil": nn.Linear(1, 1)}, file.with_suffix(".bin"))  # an object, which takes code to be read
    with pytest.raises(CheckpointError, match="cannot be read"):
        peft_config(tmp_path / "old")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_plain_layers_cannot_hold_is_refused_with_the_remedy(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    foreign(tmp_path / "theirs", tiny_model(), **options)
    with pytest.raises(CheckpointError, match=rf"uses {named}.*merge_and_unload"):
        load_peft(tiny_model(), tmp_path / "theirs")


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_the_model_is_refused_before_it_is_changed(tmp_path: Path) -> None:
    foreign(tmp_path / "head", tiny_model("qwen2"), modules_to_save=["lm_head"])
    model = tiny_model("qwen2")
    with pytest.raises(
        CheckpointError, match=r"head' holds 'lm_head.weight' in full, which is tied to 'model.embed_tokens.weight'"
    ):
        load_peft(model, tmp_path / "head")
    foreign(tmp_path / "other", tiny_model("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(CheckpointError, match=r"for other layers than this model's, such as .*c_attn"):
        load_peft(tiny_model(), tmp_path / "other")
    foreign(tmp_path / "fewer", tiny_model())
    path = tmp_path / "fewer" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["q_proj", "v_proj"]}))
    with pytest.raises(CheckpointError, match=r"PEFT itself cannot load.*v_proj"):  # there it would add adapters
        load_peft(tiny_model(), tmp_path / "fewer")
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_quantized_base_is_taken_if_it_was_quantized_from_the_one_trained_on(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    export_peft(tuned(tmp_path / "base"), tmp_path / "peft")
    model = load_causal_lm(str(tmp_path / "base"), quantization="int8")
    load_peft(model, tmp_path / "peft")
    assert lora_layers(model)
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    model = load_causal_lm(str(tmp_path / "other"), quantization="int8")
    with pytest.raises(
        CheckpointError, match=r"another base model: 1 of \d+ .*'model.layers.0.self_attn.q_proj.weight'"
    ):
        load_peft(model, tmp_path / "peft")
    assert not lora_layers(model)


def test_a_compiled_part_takes_what_the_plain_model_does(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["norm"]}
    theirs = logits(foreign(tmp_path / "theirs", tiny_model(), **options))
    model = tiny_model()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.model.norm = torch.compile(model.model.norm, backend="eager")
    load_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-5)
    export_peft(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), theirs, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_from_ranks_of_their_own_and_resumes(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base", "llama")
    options = {**KINDS["rank_pattern"], "use_rslora": False, "modules_to_save": ["norm"]}
    theirs = logits(foreign(tmp_path / "theirs", tiny_model(), **options))

    def trainer() -> Trainer:
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [MiLoRAInit(start_from=str(tmp_path / "theirs")), saving]
        return quiet_trainer(tmp_path, max_steps=4, enable_checkpointing=True, callbacks=callbacks)

    whole, again, resumed = (module(folder, attn_implementation="sdpa") for _ in range(3))
    trainer().validate(whole, data(tmp_path, folder), verbose=False)
    torch.testing.assert_close(logits(whole.model), theirs, rtol=0, atol=1e-5)
    trainer().fit(whole, data(tmp_path, folder))
    assert (logits(whole.model) - theirs).abs().max() > 0
    again.configure_model()
    load_adapter(again, tmp_path / "step=4.ckpt")
    assert torch.equal(logits(again.model), logits(whole.model))
    trainer().fit(resumed, data(tmp_path, folder), ckpt_path=tmp_path / "step=2.ckpt")
    assert torch.equal(logits(resumed.model), logits(whole.model))
    export_peft(resumed, tmp_path / "ours")
    opened = PeftModel.from_pretrained(tiny_model(), tmp_path / "ours")
    torch.testing.assert_close(logits(opened), logits(resumed.model), rtol=0, atol=1e-5)
