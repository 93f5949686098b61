"""Adapter-only checkpoints: what is in them, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.callback_modules import LanguageModel, Regression
from helpers.checkpoints import train
from helpers.models import quiet_trainer, save_tiny_model
from helpers.modules import data, module
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torchmetrics import MeanMetric

import milora_lightning
from milora_lightning import (
    CausalLMModule,
    CheckpointError,
    MiLoRAInit,
    adapters_disabled,
    export_merged,
    load_adapter,
    lora_layers,
)
from milora_lightning.checkpoint.adapter import KEY
from milora_lightning.checkpoint.fingerprint import fingerprint
from milora_lightning.checkpoint.reading import FORMAT, read_checkpoint


def adapters(lm: LightningModule) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in lm.state_dict().items() if k != KEY}


@pytest.mark.parametrize("way", ["checkpoint", "weights_only", "save_checkpoint", "last", "top-k", "exception"])
def test_every_way_of_saving_keeps_the_base_out(way: str, tmp_path: Path) -> None:
    lm = LanguageModel()
    checkpointing = ModelCheckpoint(
        tmp_path / "saved",
        every_n_train_steps=2,
        save_last=way == "last",
        save_weights_only=way == "weights_only",
        **({"monitor": "step", "mode": "max", "save_top_k": 2} if way == "top-k" else {}),
    )
    callbacks = [MiLoRAInit(r=4), checkpointing, OnExceptionCheckpoint(tmp_path, "exception")]
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=callbacks, enable_checkpointing=True)
    if way == "exception":
        lm.on_train_batch_end = lambda *_: 1 / (trainer.global_step < 4)
        with pytest.raises(ZeroDivisionError):
            trainer.fit(lm)
    else:
        trainer.fit(lm)
    if way == "save_checkpoint":
        trainer.save_checkpoint(path := tmp_path / "manual.ckpt")
    elif way == "exception":
        path = tmp_path / "exception.ckpt"
    else:
        path = Path(checkpointing.last_model_path if way == "last" else checkpointing.best_model_path)
    checkpoint = torch.load(path, weights_only=True)
    description = checkpoint["state_dict"].pop(KEY)
    factors = ("lora_A", "lora_B", "initial_A", "initial_B")
    assert checkpoint["state_dict"].keys() == {f"{name}.{f}" for name in lora_layers(lm) for f in factors}
    assert description["config"]["r"] == 4
    assert description["version"] == milora_lightning.__version__
    assert description["adapters"] == list(lora_layers(lm))
    fresh = LanguageModel()
    fresh.configure_model()
    load_adapter(fresh, path)
    ids = torch.randint(0, 128, (2, 8))
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids), lm.eval()(ids))


def test_saving_with_adapters_switched_off_saves_them(tmp_path: Path) -> None:
    lm = LanguageModel()
    path = train(tmp_path, lm)
    with adapters_disabled(lm):
        lm.trainer.save_checkpoint(tmp_path / "off.ckpt")
        export_merged(lm, tmp_path / "merged_off")
    export_merged(lm, tmp_path / "merged_on")
    on, off = (read_checkpoint(p)["state_dict"] for p in (path, tmp_path / "off.ckpt"))
    assert all(key == KEY or torch.equal(value, off[key]) for key, value in on.items())
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged_on", "merged_off")]
    assert files[0] == files[1]


def test_saving_during_validation_saves_what_training_has_reached(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    lm = module(model)

    class SaveInValidation(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.live = adapters(pl_module)
            with adapters_disabled(pl_module):
                trainer.save_checkpoint(tmp_path / "validation.ckpt")

    saving = SaveInValidation()
    options = {"max_steps": 3, "val_check_interval": 3, "num_sanity_val_steps": 0}
    quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4), saving], **options).fit(lm, data(tmp_path, model))
    saved = read_checkpoint(tmp_path / "validation.ckpt")["state_dict"]
    assert all(torch.equal(saved[key], value) for key, value in saving.live.items())
    assert any((saved[k] - saved[k.replace("lora_", "initial_")]).abs().max() > 0 for k in saving.live if "lora_" in k)


def test_a_module_alone_keeps_its_whole_state_dict(tmp_path: Path) -> None:
    """Only the LightningModule's own state dict is trimmed, the model inside stays a normal one."""
    lm = LanguageModel()
    train(tmp_path, lm)
    assert set(lm.lm.state_dict()) >= {name for name, _ in lm.lm.named_parameters()}


def test_what_the_module_trains_beside_the_adapters_is_kept(tmp_path: Path) -> None:
    lm = Regression()
    path = train(tmp_path, lm, target_modules=["0"], modules_to_save=["3"])
    state = read_checkpoint(path)["state_dict"]
    assert {"net.3.weight", "net.3.bias", "net.1.running_mean", "net.1.num_batches_tracked"} < state.keys()
    assert not {"net.0.base_layer.weight", "net.1.weight"} & state.keys()
    trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(4, target_modules=["0"], modules_to_save=["3"])])
    fresh = Regression()
    outputs = torch.cat(trainer.predict(fresh, ckpt_path=path))
    assert torch.equal(outputs, torch.cat(trainer.predict(lm)))


class WithStates(LanguageModel):
    """A module with state that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.mean.persistent(True)

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_other_states_of_the_module_are_kept(tmp_path: Path) -> None:
    lm = WithStates()
    lm.mean.update(2.0)
    path = train(tmp_path, lm)
    fresh = WithStates()
    fresh.configure_model()
    load_adapter(fresh, path)
    assert fresh.mean.compute() == 2
    assert fresh.seen == 3


def test_trainer_restores_from_the_checkpoint_without_decomposing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LanguageModel()
    path = train(tmp_path, lm)
    monkeypatch.setattr("milora_lightning.starts.algebra.singular_slice", None)  # any decomposition would fail
    resumed = LanguageModel()
    quiet_trainer(tmp_path, max_steps=3, callbacks=[MiLoRAInit(r=4)]).fit(resumed, ckpt_path=path)
    for key, value in adapters(lm).items():
        assert torch.equal(adapters(resumed)[key], value)


def test_adapters_saved_before_their_start_are_initialized_when_they_train(tmp_path: Path) -> None:
    lm = Regression()
    trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4)])
    trainer.validate(lm, verbose=False)
    trainer.save_checkpoint(tmp_path / "untrained.ckpt")
    fresh = Regression()
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[MiLoRAInit(r=4)])
    trainer.validate(fresh, ckpt_path=tmp_path / "untrained.ckpt", verbose=False)
    trainer.fit(fresh)
    assert all(layer.delta_weight().any() for layer in lora_layers(fresh).values())


def test_load_from_checkpoint_needs_the_checkpoint_and_the_base(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    lm = module(model, attn_implementation="sdpa")  # without a Trainer, auto leaves the choice to transformers
    path = train(tmp_path, lm, data(tmp_path, model), target_modules=["q_proj", "up_proj"], lora_alpha=7)
    loaded = CausalLMModule.load_from_checkpoint(path)
    assert loaded.hparams["name_or_path"] == str(model)
    batch = {"input_ids": torch.arange(9).unsqueeze(0), "labels": torch.arange(9).unsqueeze(0)}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch), lm.eval()(batch))
    assert all(layer.scaling == 7 / 4 for layer in lora_layers(loaded).values())


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"r": 8}, "adapters have r=4, this run's have r=8"),
        ({"lora_alpha": 8}, r"lora_alpha / r=1.0, this run's have lora_alpha / r=2.0"),
        ({"init": "pissa"}, "init=milora, this run's have init=pissa"),
        ({"target_modules": ["c_attn"]}, "has none for nothing and has some for 'lm.transformer.h.0.attn.c_proj'"),
    ],
)
def test_another_configuration_is_refused(here: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = train(tmp_path, LanguageModel())
    with pytest.raises(CheckpointError, match=message):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(**{"r": 4, **here})]).fit(
            LanguageModel(), ckpt_path=path
        )


def test_another_base_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    path = train(tmp_path, LanguageModel())

    def refuse(lm: LanguageModel, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_adapter(lm, path)
        assert all(not layer.initialized and not layer.lora_A.any() for layer in lora_layers(lm).values())

    changed = LanguageModel()
    changed.configure_model()
    with torch.no_grad():
        changed.lm.transformer.h[1].mlp.c_fc.weight[3, 5] += 1e-6
    refuse(changed, r"1 of \d+ frozen weights differ, for example 'lm.transformer.h.1.mlp.c_fc.weight'")
    swapped = LanguageModel()
    swapped.configure_model()
    swapped.lm.transformer.h[0], swapped.lm.transformer.h[1] = swapped.lm.transformer.h[1], swapped.lm.transformer.h[0]
    refuse(swapped, "another base model")
    cast = LanguageModel(torch.bfloat16)
    cast.configure_model()
    refuse(cast, r"float32 .* there.*bfloat16 .* here")


def corrupt(path: Path, change: Any) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm.transformer.h.0.mlp.c_fc.lora_A"), "lacks 'lm.transformer.h.0.mlp.c_fc.lora_A'"),
        (
            lambda s: s.update(renamed=s.pop("lm.transformer.h.0.mlp.c_fc.lora_A")),
            "lacks .* and has unexpected 'renamed'",
        ),
        (lambda s: s.update(stray=torch.ones(1)), "has unexpected 'stray'"),
        (lambda s: s.update({"lm.transformer.h.0.mlp.c_fc.lora_A": torch.ones(3, 3)}), r"has shape \(3, 3\)"),
        (lambda s: s[KEY].update(format=FORMAT + 1), "newer version of milora-lightning"),
        (lambda s: s.pop(KEY), "holds no adapters"),
    ],
    ids=["missing key", "renamed key", "extra key", "shape", "newer", "no adapters"],
)
def test_changed_checkpoints_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = corrupt(train(tmp_path, LanguageModel()), change)
    fresh = LanguageModel()
    with pytest.raises(CheckpointError, match=message):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(r=4)]).fit(fresh, ckpt_path=path)
    assert all(not layer.lora_A.any() for layer in lora_layers(fresh).values())


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = train(tmp_path, LanguageModel())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"trained.ckpt' cannot be read as a checkpoint"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"trained.ckpt' cannot be read as a checkpoint"):
        quiet_trainer(tmp_path, max_steps=5, callbacks=[MiLoRAInit(r=4)]).fit(LanguageModel(), ckpt_path=path)
    torch.save({"state_dict": {}, "hyper_parameters": {"where": Path("x")}}, tmp_path / "objects.ckpt")
    with pytest.raises(CheckpointError, match="it holds Python objects"):
        read_checkpoint(tmp_path / "objects.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "text.ckpt")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="no state_dict"):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_fingerprint_is_that_of_the_untouched_model(tmp_path: Path) -> None:
    lm = LanguageModel()
    lm.configure_model()
    before = fingerprint(lm.requires_grad_(False))
    quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4)], max_steps=1, precision="bf16-true").fit(lm)
    assert lm._adapter_checkpoint.fingerprint == before
    assert len(before) == sum("lora_" not in n and "initial_" not in n for n in lm.lm.state_dict())
