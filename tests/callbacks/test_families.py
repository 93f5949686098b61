"""The callback in whole small projects of many kinds: start, what trains, checkpoint, resuming, export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.families import FAMILIES, Family, Project, built
from helpers.models import quiet_trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import milora_lightning
from milora_lightning import MiLoRAInit, export_merged, export_peft, load_adapter, lora_layers
from milora_lightning.export.peft_format import task_type
from milora_lightning.utils.names import pristine_name

OPENED_BY = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
    None: peft.AutoPeftModel,
}
"""What opens an export of each task type."""


def pretrained(name: str, folder: Path) -> nn.Module:
    model = built(name)
    if not isinstance(model, PreTrainedModel):
        return model
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def output(family: Family, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return Project(family, model.eval())()


def fit(family: Family, model: nn.Module, folder: Path, ckpt: Path | None = None) -> Project:
    module = Project(family, model)
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": 3, "enable_checkpointing": True, "log_every_n_steps": 1}
    trainer = quiet_trainer(folder, callbacks=[MiLoRAInit(r=2, **family.adapter), keep], **options)
    trainer.fit(module, ckpt_path=ckpt)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    family, before = FAMILIES[name], pretrained(name, tmp_path / "base")
    # Frozen, as torch multiplies by weights that train in another order.
    at_start = output(family, copy.deepcopy(before).requires_grad_(False))
    module = fit(family, copy.deepcopy(before), tmp_path / "run")

    assert module.at_start is not None
    assert torch.equal(module.at_start, at_start)
    trained = output(family, module.model)
    assert (trained - at_start).abs().max() > 1e-3
    adapted = lora_layers(module.model)
    assert all(any(f".{layer}".endswith(f".{ending}") for layer in adapted) for ending in family.adapted)
    kept = tuple(f"{part}." for part in family.trained)
    trains = {n for n, p in module.model.named_parameters() if p.requires_grad}
    assert {n for n in trains if not n.endswith(("lora_A", "lora_B"))} == {
        n for n, _ in before.named_parameters() if n.startswith(kept or "no")
    }
    now = {pristine_name(n): p for n, p in module.model.named_parameters()}
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, now[n])}
    assert {n.rpartition(".")[0] for n in changed} == set(family.trained)

    loaded = Project(family, copy.deepcopy(before))
    load_adapter(loaded, tmp_path / "run/step=3.ckpt")
    assert torch.equal(output(family, loaded.model), trained)
    resumed = fit(family, copy.deepcopy(before), tmp_path / "resumed", tmp_path / "run/step=2.ckpt")
    assert torch.equal(output(family, resumed.model), trained)

    if family.refused:
        with pytest.raises(ValueError, match=family.refused):
            export_peft(module, tmp_path / "peft")
    else:
        export_peft(module, tmp_path / "peft")
        opened = OPENED_BY[task_type(before)].from_pretrained(tmp_path / "peft")
        torch.testing.assert_close(output(family, opened), trained, rtol=1e-5, atol=1e-5)
    if isinstance(before, PreTrainedModel):
        export_merged(module, tmp_path / "merged")
        merged = type(before).from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(output(family, merged), trained, rtol=1e-5, atol=1e-5)


class Adversaries(LightningModule):
    """A GAN: two optimizers, and a discriminator that trains in full beside the adapted generator."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(
            nn.Linear(4, 16), nn.ReLU(), nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 4, 3, padding=1)
        )
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
        self.register_buffer("noise", torch.randn(8, 4))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        real, fake = torch.ones(8, 4, 4), self.generator(self.noise)
        of_discriminator = (self.discriminator(real) - self.discriminator(fake.detach())).mean()
        self.toggled(second, of_discriminator)
        self.toggled(first, self.discriminator(fake).mean())

    def toggled(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = self.generator, self.discriminator
        return [torch.optim.Adam([p for p in part.parameters() if p.requires_grad], lr=1e-2) for part in parts]

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(1))


class Distillation(LightningModule):
    """A student with adapters learns from a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = built("sentence embedder").requires_grad_(False)
        self.student = built("sentence embedder")
        self.inputs = FAMILIES["sentence embedder"].batch()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        wanted, found = (part(**self.inputs).last_hidden_state for part in (self.teacher, self.student))
        return (wanted.roll(1, 0) - found).square().mean()

    configure_optimizers = Project.configure_optimizers
    train_dataloader = Project.train_dataloader


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "adapter", "trains"),
    [
        (Adversaries, {"module": "generator", "target_modules": ["0", "3"]}, "discriminator"),
        (Distillation, {}, None),
    ],
)
def test_of_several_models_one_is_adapted(kind: Any, adapter: Any, trains: str | None, tmp_path: Path) -> None:
    def run(steps: int, ckpt: Path | None = None) -> Any:
        module = kind()
        trainer = quiet_trainer(tmp_path, max_steps=steps, callbacks=[MiLoRAInit(r=2, **adapter)])
        trainer.fit(module, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    before, module = dict(kind().named_parameters()), run(4)
    now = {pristine_name(n): p for n, p in module.named_parameters()}
    changed = {n.partition(".")[0] for n, p in before.items() if not torch.equal(p, now[n])}
    assert changed == ({trains} if trains else set())
    adapted = {name.partition(".")[0] for name in lora_layers(module)}
    assert adapted == {"generator" if trains else "student"}
    assert all((layer.delta_weight() != 0).any() for layer in lora_layers(module).values())
    run(2)
    resumed = run(4, tmp_path / "2.ckpt")
    loaded = kind()
    load_adapter(loaded, tmp_path / "4.ckpt")
    for other in (resumed, loaded):
        assert all(torch.equal(p, module.state_dict()[n]) for n, p in other.state_dict().items() if torch.is_tensor(p))
    if trains:
        with pytest.raises(ValueError, match="contains no Hugging Face model"):
            export_peft(module, tmp_path / "peft")
    else:
        export_peft(module.student, tmp_path / "peft")
        assert (tmp_path / "peft/adapter_config.json").exists()


def test_the_table_of_families_is_of_those_that_are_tried() -> None:
    table = (Path(milora_lightning.__file__).parents[1] / "docs/models.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip() for line in table.split("\n## ")[0].splitlines() if line.startswith("| ")}
    assert rows == {"family", *FAMILIES, "GAN", "teacher and student"}
