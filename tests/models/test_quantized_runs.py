"""Whole runs on quantized bases: where they start, that they learn, and that PEFT computes the same of their export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import PeftModel

from milora_lightning import CausalLMModule, MiLoRAInit, export_peft, load_for_inference
from milora_lightning.models.pretrained import load_causal_lm

pytest.importorskip("bitsandbytes")
IDS = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(0))
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def logits(model: Any, device: str) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(device)).logits


class Watch(Callback):
    """Keeps what the model computes at the start, and each step's loss."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = logits(pl_module.model, pl_module.device.type)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["nf4", "int8"])
def test_a_run_starts_at_the_quantized_model_and_peft_computes_what_it_has_learned(
    tmp_path: Path, way: Any, device: str
) -> None:
    base = str(save_tiny_model(tmp_path / "base", "llama"))
    options: dict[str, Any] = {"warmup_steps": 0, "lr_scheduler": "constant", "learning_rate": 0.02}
    lm = CausalLMModule(base, dtype="float32", attn_implementation="sdpa", quantization=way, **options)
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}
    watch = Watch()
    limits = {"max_steps": 6, "limit_val_batches": 0, "num_sanity_val_steps": 0, "accelerator": device}
    trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4), watch], **limits)
    trainer.fit(lm, torch.utils.data.DataLoader([batch] * 6, batch_size=None))
    quantized = load_causal_lm(base, "float32", quantization=way).to(device)
    assert torch.equal(watch.start, logits(quantized.train(), device))
    assert watch.losses[-1] < watch.losses[0] - 0.01
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded, _ = load_for_inference(str(tmp_path / "last.ckpt"), device=device)
    export_peft(loaded, tmp_path / "peft")
    learned = logits(loaded, device)
    peft = PeftModel.from_pretrained(quantized, str(tmp_path / "peft")).eval()
    torch.testing.assert_close(logits(peft, device), learned, rtol=1e-4, atol=1e-4)
    with peft.disable_adapter():
        assert (logits(peft, device) - learned).abs().max() > 1e-2  # it has learned something
    assert torch.equal(
        loaded.generate(IDS[:1].to(device), max_new_tokens=3, do_sample=False),
        peft.generate(input_ids=IDS[:1].to(device), max_new_tokens=3, do_sample=False),
    )
