"""Checkpoints, exports and configs of older versions are read, and mean what they meant."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.command_line import run
from helpers.exports import logits
from helpers.models import save_tiny_model, write_examples
from helpers.modules import module
from helpers.older import CLASS_PATHS, FSDP2, VERSIONS, factors, merge, write_checkpoint, write_config, write_peft
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from milora_lightning import CheckpointError, load_adapter, load_for_inference, load_peft
from milora_lightning.checkpoint.adapter import KEY
from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.cli.main import MiLoRACLI
from milora_lightning.data import SFTDataModule
from milora_lightning.module import CausalLMModule


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    save_tiny_model(folder / "model", "llama")
    write_examples(folder / "train.jsonl", 24)
    write_examples(folder / "validation.jsonl", 4)
    return folder


def base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def meant(folder: Path) -> Tensor:
    """What a model answers whose weights hold the trained change."""
    model = base(folder)
    merge(model, factors(base(folder)))
    assert (logits(model) - logits(base(folder))).abs().max() > 0.1
    return logits(model)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_checkpoint_is_read_and_means_the_same(version: str, weights_only: bool, kept: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "old.ckpt", base(kept), version, weights_only)
    lm = module(kept / "model")
    lm.configure_model()
    assert load_adapter(lm, path).lora_alpha == 6
    torch.testing.assert_close(logits(lm.model), meant(kept), rtol=0, atol=1e-5)
    model, _ = load_for_inference(path)
    torch.testing.assert_close(logits(model), meant(kept), rtol=0, atol=1e-5)


def test_checkpoint_of_another_base_is_refused(kept: Path, tmp_path: Path) -> None:
    other = base(kept)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    path = write_checkpoint(tmp_path / "old.ckpt", other, "first")
    lm = module(kept / "model")
    lm.configure_model()
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        load_adapter(lm, path)


@pytest.mark.parametrize("version", VERSIONS)
def test_peft_export_is_read_and_means_the_same(version: str, kept: Path, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "peft", base(kept), version)
    model = base(kept)
    load_peft(model, folder)
    torch.testing.assert_close(logits(model), meant(kept), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(load_for_inference(folder)[0]), meant(kept), rtol=0, atol=1e-5)


def test_merged_export_is_read_and_means_the_same(kept: Path, tmp_path: Path) -> None:
    model = base(kept)
    merge(model, factors(base(kept)))
    model.save_pretrained(tmp_path / "merged")
    for file in (kept / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "merged")
    torch.testing.assert_close(logits(load_for_inference(tmp_path / "merged")[0]), meant(kept), rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_run_goes_on_from_its_saved_config_and_checkpoint(
    version: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(kept, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    path = write_checkpoint(folder / "old.ckpt", model, version)
    config = write_config(folder / "config.yaml", folder, version)
    run("fit", "--config", str(config), "--ckpt_path", str(path))
    later, before = read_checkpoint(folder / "saved" / "last.ckpt"), read_checkpoint(path)
    assert later["global_step"] == 6  # 24 examples, three batches of which the checkpoint has seen
    assert later["optimizer_states"][0]["state"][0]["step"] == 6
    assert {key: value.shape for key, value in later["state_dict"].items() if key != KEY} == {
        key: value.shape for key, value in before["state_dict"].items() if key != KEY
    }
    changes = [
        (later["state_dict"][key] - value).abs().max().item()
        for key, value in before["state_dict"].items()
        if key.endswith(("lora_A", "lora_B"))
    ]
    assert all(0 < change < 0.01 for change in changes)  # three small steps from where it was


@pytest.mark.parametrize("path", CLASS_PATHS)
def test_class_path_leads_to_its_class(path: str) -> None:
    room, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(room), name).__name__ == name


def test_strategy_by_lightnings_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": FSDP2, "devices": 2}}))
    args = ["--config", "milora.yaml", "--config", str(tmp_path / "fsdp2.yaml")]
    cli = MiLoRACLI(CausalLMModule, SFTDataModule, args=args, run=False, save_config_callback=None)
    assert isinstance(cli.trainer.strategy, ModelParallelStrategy)
