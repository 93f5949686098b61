"""modules_to_save="auto" finds what is new for a task, says so, and keeps to it when training has changed it."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.frozen import X
from helpers.models import quiet_trainer, tiny_model
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BartConfig,
    RobertaConfig,
    ViTConfig,
)

from milora_lightning import LoRAConfig, MiLoRAInit, inject, load_adapter
from milora_lightning.adapters.new_layers import saved_names
from milora_lightning.checkpoint.reading import read_checkpoint

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
BART = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}


def found(model: nn.Module) -> list[str]:
    return saved_names(model, LoRAConfig(modules_to_save="auto"))


def pretrained(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    for layer in layers:
        nn.init.normal_(layer.weight)
    return nn.Sequential(*layers)


def test_heads_of_transformers_are_found_whole() -> None:
    llama = tiny_model("llama")
    assert found(llama) == []  # output embeddings are no head of a task
    config = copy.deepcopy(llama.config)
    config.num_labels, config.pad_token_id = 3, 0
    assert found(AutoModelForSequenceClassification.from_config(config)) == ["score"]
    roberta = RobertaConfig(vocab_size=64, **SIZES, num_labels=3)
    assert found(AutoModelForSequenceClassification.from_config(roberta)) == ["classifier"]
    bart = BartConfig(vocab_size=64, **BART, num_labels=3)
    assert found(AutoModelForSequenceClassification.from_config(bart)) == ["classification_head"]
    vit = ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES)
    assert found(AutoModelForImageClassification.from_config(vit)) == ["classifier"]


def test_layers_are_found_by_their_values_and_pretrained_ones_are_not() -> None:
    body = pretrained(16, 16, 16)
    attention = nn.ModuleDict({"q_proj": pretrained(16, 16), "out_proj": pretrained(16, 16)[0]})
    model = nn.ModuleDict({"body": body, "attention": attention, "projection": nn.Linear(16, 16)})
    assert found(model) == ["projection"]
    assert found(nn.ModuleDict({"body": nn.Sequential(nn.Linear(16, 16)), "other": nn.Linear(16, 16)})) == []
    head = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    assert found(nn.ModuleDict({"body": body, "head": head})) == ["head"]  # with its normalization
    frozen = nn.Linear(16, 16).requires_grad_(False)
    assert found(nn.ModuleDict({"body": body, "teacher": frozen})) == []


def test_layers_beside_a_head_are_found_though_their_names_begin_as_its_name() -> None:
    head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
    model = nn.ModuleDict({"body": pretrained(16, 16, 16), "head": head, "head_aux": nn.Linear(16, 16)})
    assert found(model) == ["head", "head_aux"]  # and of the head no layer beside it


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = pretrained(16, 16, 16)
        torch.manual_seed(1)
        self.task = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.task(self.body(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> Any:
        return DataLoader(X[:4], batch_size=4)  # the same in every step


def fit(module: Module, folder: Path, steps: int, ckpt: Path | None = None) -> Module:
    trainer = quiet_trainer(folder, max_steps=steps, callbacks=[MiLoRAInit(r=2, modules_to_save="auto")])
    trainer.fit(module, ckpt_path=ckpt)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


def test_what_was_found_trains_is_saved_and_loaded(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"\"auto\": 'task': new or a classifier's, and trained in full"):
        module = fit(Module(), tmp_path, 2)
    assert not torch.equal(module.task.weight, Module().task.weight)
    nn.init.normal_(module.task.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject(module, LoRAConfig(r=2, modules_to_save="auto"))
        assert module.task.weight.requires_grad  # though it does not look new any more
        once = fit(Module(), tmp_path, 4)
        resumed = fit(Module(), tmp_path, 4, tmp_path / "2.ckpt")
        assert torch.equal(once(X), resumed(X))
    state = read_checkpoint(tmp_path / "2.ckpt")["state_dict"]
    assert next(v for v in state.values() if isinstance(v, dict))["config"]["modules_to_save"] == ("task",)
    fresh = Module()
    nn.init.normal_(fresh.task.weight)  # nothing to be seen of a new layer: the checkpoint names it
    load_adapter(fresh, tmp_path / "4.ckpt")
    assert torch.equal(fresh(X), once(X))


def test_nothing_new_is_said() -> None:
    with pytest.warns(UserWarning, match='modules_to_save="auto": nothing looks new'):
        inject(pretrained(16, 16), LoRAConfig(r=2, modules_to_save="auto"))
    with pytest.raises(ValueError, match=r'takes a list of names: .*, or "auto"'):
        LoRAConfig(modules_to_save="head")


class Filter(nn.Module):
    """A filter of frequencies, as after a Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, dtype=torch.complex64))
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)


def test_complex_weights_train_in_full_and_integers_stay() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(8, 8), "filter": Filter()})
    inject(model, LoRAConfig(r=2, target_modules=["proj"], modules_to_save=("filter",)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"proj.lora_A", "proj.lora_B", "filter.weight"}
    assert model["filter"].weight.dtype == torch.complex64
