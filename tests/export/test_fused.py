"""Checkpoints and exports of fused projections whose parts have factors of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import move
from helpers.fused import IDS, PARTS, adapted, phi3
from helpers.models import quiet_trainer
from lightning.pytorch import LightningModule
from peft import AutoPeftModelForCausalLM
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from milora_lightning import LoRAConfig, MiLoRAInit, export_merged, export_peft, load_adapter, load_peft, lora_layers
from milora_lightning.checkpoint.io import CheckpointError


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=16, n_layer=1, n_head=4, n_positions=16)).eval()


CASES: dict[str, tuple[Any, dict[str, Any]]] = {"phi3": (phi3, PARTS), "gpt2": (gpt2, {"c_attn": [16, 16, 16]})}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", list(CASES))
def test_exports_compute_what_was_trained(kind: str, tmp_path: Path) -> None:
    build, parts = CASES[kind]
    build().save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), parts)
    start = logits(model)
    move(model)
    live = logits(model)
    assert (live - start).abs().max() > 1e-2
    assert export_peft(model, tmp_path / "peft") == 0
    export_merged(model, tmp_path / "merged")
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")
    torch.testing.assert_close(logits(opened), live, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(opened.merge_and_unload()), live, rtol=0, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), live, rtol=0, atol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_peft(again, tmp_path / "peft")
    torch.testing.assert_close(logits(again), live, rtol=0, atol=1e-5)
    name = next(iter(parts))
    ranks = {layer.r for key, layer in lora_layers(again).items() if key.endswith(name)}
    assert ranks == {2 * 3 * 3}  # twice the rank of each of three parts
    assert export_peft(model, tmp_path / "small", rank=2) > 0


class Training(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.lm = phi3()

    def training_step(self, batch: Tensor) -> Tensor:
        return self.lm(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)

    def train_dataloader(self) -> Any:
        return DataLoader(IDS.repeat(4, 1), batch_size=2)


def run(folder: Path, steps: int, ckpt: Path | None = None, **options: Any) -> Training:
    module = Training()
    callback = MiLoRAInit(**{"r": 3, "fused_parts": PARTS, **options})
    trainer = quiet_trainer(folder, max_steps=steps, callbacks=[callback])
    trainer.fit(module, ckpt_path=ckpt)
    trainer.save_checkpoint(folder / "trained.ckpt")
    return module


def test_checkpoints_resume_and_know_the_parts(tmp_path: Path) -> None:
    straight = run(tmp_path, 4)
    run(tmp_path, 2)
    as_number = {"qkv_proj": [16, 8, 8], "gate_up_proj": [24, 24]}  # the same in other words
    resumed = run(tmp_path, 4, tmp_path / "trained.ckpt", fused_parts=as_number)
    for name, layer in lora_layers(resumed).items():
        assert torch.equal(layer.lora_A, lora_layers(straight)[name].lora_A)
        assert torch.equal(layer.lora_B, lora_layers(straight)[name].lora_B)
    fresh = Training()
    assert load_adapter(fresh, tmp_path / "trained.ckpt").fused_parts == as_number
    assert torch.equal(logits(fresh.lm), logits(resumed.lm))
    for other in ({}, {"qkv_proj": [8, 8, 16], "gate_up_proj": 2}):
        with pytest.raises(
            CheckpointError, match="The checkpoint's adapters have fused_parts=\\(16, 8, 8\\), this run"
        ):
            run(tmp_path / "other", 4, tmp_path / "trained.ckpt", fused_parts=other)


@pytest.mark.parametrize(
    "option", [{"fused_parts": PARTS}, {"decay_to_start": 0.1}, {"statistics_batches": 4}, {"preserve": "text.txt"}]
)
def test_folders_of_peft_refuse_what_they_have_no_place_for(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} cannot be used with start_from"):
        MiLoRAInit(start_from=str(tmp_path), **option)


def test_configurations_of_older_versions_have_no_parts() -> None:
    assert LoRAConfig(r=2).parts("qkv_proj", 8) == ()
