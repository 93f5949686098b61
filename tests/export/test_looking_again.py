"""What exports are looked at by once more: the Hub's names, copies without weights, and PEFT's own reading."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from milora_lightning import LoRAConfig, export_peft, initialize, initialize_peft, inject, lora_layers
from milora_lightning.adapters import factor_cache
from milora_lightning.export import hub
from milora_lightning.export.model_card import model_card
from milora_lightning.export.peft_layers import objection_to_layers
from milora_lightning.export.peft_trial import opens_otherwise
from milora_lightning.export.skeleton import skeleton


@pytest.mark.parametrize(("name", "asked"), [("tuned", "me/tuned"), ("group/tuned", "group/tuned")])
def test_a_name_without_a_user_is_in_the_own_namespace(name: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(found: str) -> Any:
        if found != asked:
            raise OSError(f"no such {found}")
        return SimpleNamespace(id=found, private=False)

    api = SimpleNamespace(whoami=lambda: {"name": "me"}, model_info=look)
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    hub.check_upload(name, private=False)
    with pytest.raises(ValueError, match=f"^'{asked}' already exists and is public"):
        hub.check_upload(name, private=True)
    api.whoami = lambda: {}["name"]
    with pytest.raises(ValueError, match=rf"^'{name}' cannot be uploaded to: 'name'\.$"):
        hub.check_upload(name, private=False)


def test_a_copy_without_weights_shares_nothing_that_can_be_changed() -> None:
    model = tiny_model("llama")
    model.model.register_module("absent", None)
    model.config.rope_parameters = {"rope_theta": 1.0}
    inject(model, LoRAConfig(r=2))
    copied = skeleton(model)
    assert not lora_layers(copied)
    assert copied.model._modules["absent"] is None
    copied.config.rope_parameters["rope_theta"] = 2.0
    assert model.config.rope_parameters == {"rope_theta": 1.0}
    plain = tiny_model("llama")
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in copied.state_dict().items()} == shapes
    assert all(tensor.untyped_storage().nbytes() <= 8 for tensor in copied.parameters())


@pytest.fixture
def exported(tmp_path: Path) -> tuple[nn.Module, Path, dict[str, torch.Tensor], dict[str, float]]:
    """A trained model, its folder, and the tensors and scales that PEFT is to find there; one is of an embedding."""
    model = tiny_model("llama")
    inject(model, LoRAConfig(r=2, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]))
    initialize(model, cache=False)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.add_(0.1)
    export_peft(model, tmp_path / "peft")
    tensors = {}
    for key, value in load_file(tmp_path / "peft" / "adapter_model.safetensors").items():
        tensors[key.replace("lora_embedding_A", "lora_A.weight").replace("lora_embedding_B", "lora_B.weight")] = value
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    scales = dict.fromkeys(lora_layers(model), config["lora_alpha"] / config["r"])
    return model, tmp_path / "peft", tensors, scales


def test_peft_finds_what_has_been_written(exported: Any) -> None:
    model, folder, tensors, scales = exported
    assert opens_otherwise(folder, model, tensors, scales) is None
    name = next(name for name in scales if "q_proj" in name)
    said = opens_otherwise(folder, model, tensors, {**scales, name: 2 * scales[name]})
    assert said == f"it scales {name!r} by {scales[name]:g}, not {2 * scales[name]:g}"
    without = {other: scale for other, scale in scales.items() if other != name}
    assert opens_otherwise(folder, model, tensors, without) == f"it adapts 1 more layer, such as {name!r}"
    more = opens_otherwise(folder, model, tensors, {**scales, "other": 1.0})
    assert more == "it leaves out the adapters of 1 layer, such as 'other'"
    for key, value in tensors.items():
        said = opens_otherwise(folder, model, {**tensors, key: value + 1}, scales)
        assert said == f"it reads {key!r} as another tensor"
        rest = {other: kept for other, kept in tensors.items() if other != key}
        assert opens_otherwise(folder, model, rest, scales) == f"it misses the tensor {key!r}"


class Reading(nn.Module):
    """Reads a setting of a convolution, as Whisper's encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(4, 8, 3), nn.Conv1d(4, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(x[..., :: self.conv1.stride[0]]) + self.conv2(x)


@pytest.mark.parametrize(("name", "refused"), [("conv1", True), ("conv2", False)])
def test_a_setting_that_a_model_reads_is_missed_in_pefts_layers(name: str, refused: bool) -> None:
    model = nn.Sequential(Reading())
    inject(model, LoRAConfig(r=2, target_modules=[name]))
    said = objection_to_layers(model)
    assert said == ("the model reads conv1.stride, which its adapters of convolutions do not have" if refused else None)


@pytest.mark.parametrize(("library", "given"), [("peft", ", num_labels=5"), ("transformers", "")])
def test_a_card_says_how_many_labels_where_the_folder_does_not(library: str, given: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=5, **sizes))
    inject(model, LoRAConfig(r=2, target_modules=["query"]))
    card = model_card(model, "adapters", library)
    assert f"ForSequenceClassification.from_pretrained(folder{given})" in card
    assert "num_labels" not in model_card(tiny_adapted(), "adapters", library)


def tiny_adapted() -> Any:
    model = tiny_model("llama")
    inject(model, LoRAConfig(r=2))
    return model


@pytest.mark.parametrize("cache", [True, False])
def test_decompositions_for_peft_are_kept_if_they_may_be(
    cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    monkeypatch.setattr(factor_cache, "_SMALLEST", 1)
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    initialize_peft(model, cache=cache)
    assert any(path.is_file() for path in tmp_path.rglob("*")) is cache
