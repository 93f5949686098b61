"""Whole runs with all monitors, on any device: training, resuming, evaluation, answers and export."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig

from helpers.models import TINY_CONFIGS, quiet_trainer, tiny_tokenizer
from helpers.modules import data, module
from helpers.small_models import small_config
from milora_lightning import (
    CausalLMModule,
    ForgettingMonitor,
    MiLoRAInit,
    PrincipalProjection,
    SFTDataModule,
    SubspaceMonitor,
    export_peft,
)
from milora_lightning.callbacks import RandomState

KINDS = ("llama", "qwen3", "gemma", "gpt2", "mixtral")
STEPS = 3


def config(kind: str) -> PretrainedConfig:
    """A configuration without dropout of its own, which every device would draw in its own way."""
    if kind == "mixtral":
        return small_config(MixtralConfig, vocab_size=128, sliding_window=None)
    made = TINY_CONFIGS[kind]
    if kind == "gpt2":
        made.update(dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0))
    return made


def write_base(folder: Path, kind: str) -> Path:
    """Write a model, and a text to measure forgetting on."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(kind)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines = (json.dumps({"text": f"What is {i} plus 2?"}) + "\n" for i in range(30))
    (folder / "text.jsonl").write_text("".join(lines))
    return folder


class Where(Callback):
    """Notes on which devices parameters and buffers are at the end of training."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.devices = {tensor.device for tensor in (*pl_module.parameters(), *pl_module.buffers())}


def monitors(base: Path) -> list[Callback]:
    text = ForgettingMonitor(str(base / "text.jsonl"), "text", block_length=16, max_tokens=48, batch_size=4)
    return [PrincipalProjection(4), SubspaceMonitor(every_n_steps=2), text, RandomState()]


def examples(base: Path, name: str) -> SFTDataModule:
    """Few large batches, because each operation takes its time on a simulated device."""
    return data(base / name, base / "model", eval_batch_size=16, num_generation_examples=3)


def fit(
    base: Path,
    name: str,
    callbacks: list[Callback],
    device: dict[str, Any],
    resume: Path | None = None,
    dropout: float = 0.1,
    lm: CausalLMModule | None = None,
    **options: Any,
) -> CausalLMModule:
    """Train a few steps.

    Args:
        base: What :func:`write_base` has written.
        name: Folder of the run, inside it.
        callbacks: Callbacks besides the adapters.
        device: The Trainer's options that choose the device.
        resume: Checkpoint to go on from.
        dropout: That of the adapters.
        lm: The module; by default a new one.
        options: Further options of the Trainer.
    """
    (base / name).mkdir(exist_ok=True)
    adapters = MiLoRAInit(r=4, lora_dropout=dropout, cache=False, seed=3)
    settings = {"max_steps": STEPS, **options, **device}
    trainer = quiet_trainer(base / name, callbacks=[adapters, *callbacks], **settings)
    torch.manual_seed(5)
    lm = lm or module(base / "model")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*could not decompose a weight.*")
        trainer.fit(lm, examples(base, name), ckpt_path=resume)
    return lm


def everything(
    base: Path, name: str, device: dict[str, Any], dropout: float = 0.1, again: bool = True
) -> dict[str, Any]:
    """Train with all monitors, evaluating on the way, save and export; ``again``: resume, validate and answer, too."""
    saving = ModelCheckpoint(base / name, "{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"val_check_interval": 2, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    where = Where()
    lm = fit(base, name, [*monitors(base), saving, where], device, dropout=dropout, **options)
    results = dict(lm.trainer.callback_metrics)
    ended = {"devices": where.devices, "state": _tensors(lm)}
    export_peft(lm, base / name / "exported")
    if not again:
        return {**ended, "results": {key: float(value) for key, value in results.items()}}
    resumed = fit(base, name, monitors(base), device, base / name / "step=2.ckpt", dropout, num_sanity_val_steps=0)
    asking = quiet_trainer(base / name, **device)
    answers = asking.predict(lm, examples(base, name))
    validated = asking.validate(lm, examples(base, name), verbose=False)[0]
    return {
        **ended,
        "results": {key: float(value) for key, value in {**results, **validated}.items()},
        "resumed": _tensors(resumed),
        "answers": answers,
    }


def _tensors(lm: CausalLMModule) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu() for key, value in lm.state_dict().items() if isinstance(value, torch.Tensor)}


def assert_same(there: dict[str, Any], here: dict[str, Any], rtol: float = 1e-4) -> None:
    """Two runs have learned, measured and answered the same, up to rounding."""
    for part in {"state", "resumed"} & here.keys():
        assert there[part].keys() == here[part].keys()
        for key, value in here[part].items():
            # But for the signs of singular vectors, which are free and stay with the factors through training
            torch.testing.assert_close(there[part][key].abs(), value.abs(), rtol=rtol, atol=rtol / 10)
    starts = [key for key in here["state"] if "initial_" in key]
    assert starts
    assert any(not torch.equal(here["state"][key.replace("initial_", "lora_")], here["state"][key]) for key in starts)
    for key, value in here["results"].items():
        if "second" not in key and "memory" not in key:
            assert abs(there["results"][key] - value) <= 10 * rtol * abs(value) + rtol, key
    assert there.get("answers") == here.get("answers")
