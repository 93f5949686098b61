"""Exports of every kind of model open in PEFT's own classes or are refused, and say of themselves what is readable."""

from __future__ import annotations

import copy
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers.exports import move
from helpers.models import quiet_trainer, tiny_model
from huggingface_hub import ModelCard
from lightning.pytorch import LightningModule
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from milora_lightning import LoRAConfig, MiLoRAInit, export_merged, export_peft, initialize, inject, lora_layers
from milora_lightning.export.peft_trial import objection

IDS = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "num_key_value_heads": 2}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {  # configuration, class, sizes, PEFT's class
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, "CausalLM"),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48,
           "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}, "Seq2SeqLM"),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART, "Seq2SeqLM"),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", {**BART, "num_mel_bins": 8,
                "max_source_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                "decoder_start_token_id": 1}, ""),
    "vit": ("ViTConfig", "ViTForImageClassification", {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 5}, ""),
    "bert": ("BertConfig", "BertForSequenceClassification", {**SIZES, "num_labels": 5}, "SequenceClassification"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**SIZES, "num_labels": 5},
                "SequenceClassification"),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", {"vocab_size": 64, "dim": 32,
                   "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "num_labels": 5}, "SequenceClassification"),
    "llama classifier": ("LlamaConfig", "LlamaForSequenceClassification", {**LLAMA, "num_labels": 5,
                         "pad_token_id": 0}, "SequenceClassification"),
    "tagger": ("BertConfig", "BertForTokenClassification", {**SIZES, "num_labels": 5}, "TokenClassification"),
    "answerer": ("BertConfig", "BertForQuestionAnswering", SIZES, "QuestionAnswering"),
    "encoder": ("BertConfig", "BertModel", SIZES, "FeatureExtraction"),
    "masked": ("BertConfig", "BertForMaskedLM", SIZES, ""),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}, "CausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**LLAMA, **MOE, "mlp_only_layers": [0]}, "CausalLM"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK, "CausalLM"),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
              "state_size": 4}, "CausalLM"),
}  # fmt: skip


def build(kind: str) -> PreTrainedModel:
    config, cls, sizes, _ = MODELS[kind]
    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()


def tuned(kind: str, folder: Path, **options: Any) -> PreTrainedModel:
    build(kind).save_pretrained(folder)
    model = getattr(transformers, MODELS[kind][1]).from_pretrained(folder)
    inject(model, LoRAConfig(**{"r": 2, **options}))
    initialize(model)
    move(model)
    return model.eval()


@torch.no_grad()
def output(kind: str, model: nn.Module) -> Tensor:
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    elif kind == "whisper":
        features = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
        inputs = {"input_features": features, "decoder_input_ids": IDS}
    else:
        inputs = {"input_ids": IDS}
        inputs |= {"decoder_input_ids": IDS} if kind in ("t5", "bart") else {"attention_mask": torch.ones_like(IDS)}
    return model.eval()(**inputs)[0]


def targets(kind: str) -> dict[str, Any]:
    """What PEFT can hold of each kind."""
    return {"target_modules": ["in_proj"]} if kind == "mamba" else {}


@pytest.mark.parametrize("kind", MODELS)
def test_pefts_own_classes_open_the_export(kind: str, tmp_path: Path) -> None:
    model = tuned(kind, tmp_path / "base", **targets(kind))
    live = output(kind, model)
    export_peft(model, tmp_path / "peft")
    name, options = f"AutoPeftModel{f'For{MODELS[kind][3]}' if MODELS[kind][3] else ''}", {}
    assert f"{name}.from_pretrained" in (tmp_path / "peft" / "README.md").read_text()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected).*")
        opened = getattr(peft, name).from_pretrained(tmp_path / "peft", **options)
        by_hand = PeftModel.from_pretrained(build(kind), tmp_path / "peft")
    torch.testing.assert_close(output(kind, opened), live, rtol=0, atol=1e-5)
    torch.testing.assert_close(output(kind, by_hand), live, rtol=0, atol=1e-5)
    assert (output(kind, build(kind)) - live).abs().max() > 1e-3
    export_merged(model, tmp_path / "merged")
    merged = getattr(transformers, MODELS[kind][1]).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(kind, merged), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3_moe", {"target_modules": ["q_proj", "up_proj", "down_proj"]}),
        ("deepseek_v3", {"target_modules": ["q_a_proj", "down_proj"]}),
    ],
)
def test_layers_named_as_experts_were_are_opened_by_peft(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT takes such names for the experts of transformers 4, and leaves the layers out."""
    model = tuned(kind, tmp_path / "base", **options)
    export_peft(model, tmp_path / "peft")
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")
    torch.testing.assert_close(output(kind, opened), output(kind, model), rtol=0, atol=1e-5)
    assert (output(kind, build(kind)) - output(kind, model)).abs().max() > 1e-3


def test_what_peft_would_open_wrong_is_refused_and_merges(tmp_path: Path) -> None:
    kind = "mamba"
    model = tuned(kind, tmp_path / "base", target_modules="all-linear")
    with pytest.raises(ValueError, match=r"PEFT cannot represent these adapters.*merged format"):
        export_peft(model, tmp_path / "peft")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    export_merged(model, tmp_path / "merged")
    merged = getattr(transformers, MODELS[kind][1]).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(kind, merged), output(kind, model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {"modules_to_save": ["classifier"]}),
        ("bert", {"modules_to_save": ["classifier", "LayerNorm"]}),
        ("roberta", {"modules_to_save": ["classifier"]}),
        ("roberta", {"target_modules": ["query", "classifier.dense"]}),  # an adapter in what PEFT keeps whole
        ("vit", {"modules_to_save": ["classifier"]}),
        ("vit", {"modules_to_save": ["embeddings"]}),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),  # tied to the head
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 3, r"h\.1\..*": 1}}),
        ("gpt2", {"lora_alpha": 3, "rank_pattern": {"c_fc": 5}, "alpha_pattern": {r"h\.1\.attn\.c_attn": 1}}),
        ("llama classifier", {"modules_to_save": ["score", "norm"], "target_modules": ["q_proj"]}),
    ],
)
def test_what_trains_in_full_and_other_ranks_travel_along(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tuned(kind, tmp_path / "base", **options)
    live = output(kind, model)
    export_peft(model, tmp_path / "peft")
    fresh = getattr(transformers, MODELS[kind][1]).from_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(fresh, tmp_path / "peft")
    torch.testing.assert_close(output(kind, opened), live, rtol=0, atol=1e-5)
    export_merged(model, tmp_path / "merged")
    merged = getattr(transformers, MODELS[kind][1]).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(kind, merged), live, rtol=0, atol=1e-5)


def test_what_peft_will_refuse_is_said_when_training_starts(tmp_path: Path) -> None:
    def said(model: PreTrainedModel, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(r=2, **options)]).fit(
                Tuner(model), DataLoader(IDS, 2)
            )
        return [str(w.message) for w in caught if "export for PEFT" in str(w.message)]

    assert "dt_proj" in said(build("mamba"))[0]
    assert "out_proj" in said(build("mamba"), target_modules=["in_proj", "out_proj"])[0]
    assert said(build("mamba"), target_modules=["in_proj"]) == []
    assert said(build("gpt2")) == []


class Tuner(LightningModule):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_asking_peft_leaves_nothing_behind() -> None:
    model = build("gpt2")
    inject(model, LoRAConfig(r=2))
    before = copy.deepcopy(model.state_dict()), str(model), model.config.to_dict(), torch.get_rng_state()
    assert objection(model) is None
    after = model.state_dict(), str(model), model.config.to_dict(), torch.get_rng_state()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert not {"peft_config", "hf_device_map"} & vars(model).keys()


class FSDPBlock(FSDPModule, transformers.models.gpt2.modeling_gpt2.GPT2Block):
    """What fully_shard makes of a block."""


def test_peft_is_asked_about_the_layers_below_shards() -> None:
    model = build("gpt2")
    inject(model, LoRAConfig(r=2))
    for block in model.transformer.h:
        block.__class__ = FSDPBlock
    assert objection(model) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_trained_on_a_half_precision_base(dtype: torch.dtype, tmp_path: Path) -> None:
    build("bert").to(dtype).save_pretrained(tmp_path / "base")
    cls = transformers.BertForSequenceClassification
    model = cls.from_pretrained(tmp_path / "base", dtype=dtype)
    inject(model, LoRAConfig(r=2, modules_to_save=["classifier"]))
    initialize(model)
    move(model)
    export_peft(model, tmp_path / "peft")
    export_merged(model, tmp_path / "merged", dtype="float32")
    base = cls.from_pretrained(tmp_path / "base", dtype=torch.float32)
    opened = PeftModel.from_pretrained(base, tmp_path / "peft")
    merged = cls.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output("bert", opened), output("bert", merged), rtol=0, atol=1e-5)
    torch.testing.assert_close(output("bert", model).float(), output("bert", merged), rtol=0.05, atol=0.05)


def test_a_classifier_on_a_base_without_one_opens_as_its_card_says(tmp_path: Path) -> None:
    build("encoder").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    inject(model, LoRAConfig(r=2, modules_to_save=["classifier"]))
    initialize(model)
    move(model)
    export_peft(model, tmp_path / "peft")
    code = ModelCard.load(tmp_path / "peft" / "README.md").text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace('"."', repr(str(tmp_path / "peft"))), names)
    torch.testing.assert_close(output("bert", names["model"]), output("bert", model), rtol=0, atol=1e-5)


def test_the_model_with_adapters_is_exported_wherever_it_stands(tmp_path: Path) -> None:
    student = tuned("gpt2", tmp_path / "base")
    pair = nn.ModuleDict({"teacher": build("bert"), "student": student})
    export_peft(pair, tmp_path / "peft")
    opened = PeftModel.from_pretrained(build("gpt2"), tmp_path / "peft")
    torch.testing.assert_close(output("gpt2", opened), output("gpt2", student), rtol=0, atol=1e-5)
    two = nn.ModuleDict({"one": student, "two": copy.deepcopy(student)})
    for export in (export_peft, export_merged):
        with pytest.raises(ValueError, match=r"several.*'one', 'two'.*module\.one"):
            export(two, tmp_path / "two")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_reports_what_rounding_takes_and_float32_keeps_it(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(dtype=dtype)
    inject(model, LoRAConfig(r=4, modules_to_save=["norm"]))
    initialize(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.add_(torch.randn_like(layer.lora_B), alpha=1e-3)
    lost = export_merged(model, tmp_path / "own")
    whole = export_merged(model, tmp_path / "float32", dtype="float32")
    error = energy = 0.0
    for name, layer in lora_layers(model).items():
        weight, delta = layer.base_layer.weight.double(), layer.delta_weight().double()
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own").get_submodule(name).weight
        error += ((merged.double() - weight) - delta).square().sum().item()
        energy += delta.square().sum().item()
    assert lost == pytest.approx((error / energy) ** 0.5, rel=1e-3)
    assert lost > 0.01
    assert whole < 1e-4
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32")
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "float32").dtype == torch.float32
    assert transformers.AutoConfig.from_pretrained(tmp_path / "own").dtype == dtype
    assert model.config.dtype == dtype
    exact = tiny_model(dtype=dtype).float()
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            exact.get_submodule(name).weight.add_(layer.delta_weight())
        torch.testing.assert_close(opened(IDS).logits, exact(IDS).logits, rtol=0, atol=1e-5)


def test_a_sum_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = tuned("gpt2", tmp_path / "base")
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B.fill_(1e6)
    with pytest.raises(ValueError, match="choose dtype float32 or bfloat16"):
        export_merged(model, tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()
    export_merged(model, tmp_path / "merged", dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype must be float32"):
        export_merged(model, tmp_path / "other", dtype="int8")


@pytest.mark.parametrize("name", ["my base: v1", 'it\'s "quoted" #1', "single", "a/b"])
def test_cards_are_readable_wherever_the_base_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tuned("gpt2", Path(name))
    assert model.config.name_or_path == name
    for export in (export_peft, export_merged):
        folder = tmp_path / export.__name__
        export(model, folder, data="rows: [of `x`]")
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model is None  # a path is no name on the Hub
        assert str(tmp_path / name) in card.content
        assert "rows: [of `x`]" in card.content
    monkeypatch.chdir("/")
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export_peft")
    torch.testing.assert_close(output("gpt2", opened), output("gpt2", model), rtol=0, atol=1e-5)


def test_card_names_a_base_of_the_hub(tmp_path: Path) -> None:
    model = tuned("gpt2", tmp_path / "base")
    model.config.name_or_path = "openai-community/gpt2"
    export_peft(model, tmp_path / "peft")
    assert ModelCard.load(tmp_path / "peft" / "README.md").data.base_model == "openai-community/gpt2"


def test_files_are_readable_by_whom_the_umask_says(tmp_path: Path) -> None:
    model = tuned("gpt2", tmp_path / "base")
    before = os.umask(0o027)
    try:
        export_peft(model, tmp_path / "peft")
        export_merged(model, tmp_path / "merged")
    finally:
        os.umask(before)
    for folder in (tmp_path / "peft", tmp_path / "merged"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o640}
