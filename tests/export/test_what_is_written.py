"""What folders hold beside the factors, and what is said where something cannot be held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.exports import tuned
from helpers.models import tiny_tokenizer
from peft import LoraConfig
from safetensors import safe_open
from transformers import GenerationConfig

from milora_lightning import CheckpointError, export_merged, export_peft
from milora_lightning.data.encoding.prompt_format import PromptFormat
from milora_lightning.export.model_card import model_card
from milora_lightning.export.peft_folder import as_ours
from milora_lightning.utils.errors import InvalidInputError


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", ".", "two/names/too-many"])
def test_the_card_names_a_base_of_the_hub_alone(name: str, tmp_path: Path) -> None:
    """The Hub refuses a card with another; a folder of the user's machine says nothing to others."""
    model = tuned(tmp_path / "base")
    model.config.name_or_path = model.name_or_path = name
    export_peft(model, tmp_path / "peft")
    front = yaml.safe_load((tmp_path / "peft" / "README.md").read_text().split("---")[1])
    assert front.get("base_model") == (name if name.count("/") == 1 else None)
    assert front["library_name"] == "peft"


def test_files_say_what_framework_they_are_for(tmp_path: Path) -> None:
    """Other libraries refuse files that do not."""
    model = tuned(tmp_path / "base")
    export_peft(model, tmp_path / "peft")
    export_merged(model, tmp_path / "merged")
    for path in (tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "merged" / "model.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"


def test_a_weight_too_large_for_a_dtype_is_named(tmp_path: Path) -> None:
    model = tuned(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.base_layer.weight[0, 0] = 1e6
    with pytest.raises(InvalidInputError, match=r"'model\.layers\.1\.mlp\.up_proj' has values up to 1e\+06"):
        export_merged(model, tmp_path / "merged", dtype=torch.float16)
    assert not (tmp_path / "merged").exists()


def test_a_folder_without_factors_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no factors \(lora_A, lora_B\) of linear layers"):
        as_ours(LoraConfig(target_modules=["q_proj"]), {"base_model.model.lm_head.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("known", [True, False])
def test_prompts_that_no_chat_template_writes_are_told(
    known: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    tokenizer: Any = tiny_tokenizer()
    prompts = PromptFormat.of(tokenizer, "alpaca")
    prompts = prompts if known else replace(prompts, chat_template=None)
    export_peft(tuned(tmp_path / "base"), tmp_path / "peft", tokenizer=tokenizer, prompt_format=prompts)
    card = (tmp_path / "peft" / "README.md").read_text()
    told = ["write prompts exactly as the model was trained on them" in str(each.message) for each in recwarn]
    assert any(told) != known
    assert ("which no chat template writes" in card) != known
    assert ("The tokenizer's chat template writes it" in card) == known


def test_an_export_adds_stop_tokens_to_its_own_configuration_alone(tmp_path: Path) -> None:
    model, tokenizer = tuned(tmp_path / "base"), tiny_tokenizer()
    prompts = replace(PromptFormat.of(tokenizer, "alpaca"), end_of_turn="<unk>")
    before = model.generation_config.to_dict()
    export_merged(model, tmp_path / "merged", tokenizer=tokenizer, prompt_format=prompts)
    assert model.generation_config.to_dict() == before
    written = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids("<unk>") in written.eos_token_id


def test_the_card_tells_the_range_of_settings_that_differ(tmp_path: Path) -> None:
    model = tuned(tmp_path / "base", rank_pattern={"k_proj": 2, "v_proj": 8}, alpha_pattern={"up_proj": 1.5})
    assert "r = 2 to 8, lora_alpha = 1.5 to 6, " in model_card(model, "adapters", "peft")
    assert "r = 4, lora_alpha = 6, " in model_card(tuned(tmp_path / "base"), "adapters", "peft")
