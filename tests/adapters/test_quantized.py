"""Adapters on bitsandbytes-quantized bases."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from helpers.callback_modules import LanguageModel
from helpers.models import quiet_trainer, tiny_model
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from milora_lightning import (
    LoRAConfig,
    MiLoRAInit,
    adapters_disabled,
    export_merged,
    export_peft,
    initialize,
    inject,
    load_adapter,
    load_peft,
    lora_layers,
)
from milora_lightning.adapters.base_weight import dense_weight
from milora_lightning.checkpoint.adapter import KEY

pytest.importorskip("bitsandbytes")
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
WAYS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def quantized(folder: Path, way: str) -> PreTrainedModel:
    tiny_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=WAYS[way], dtype=torch.float32)


@pytest.mark.parametrize("way", list(WAYS))
def test_start_equals_the_quantized_model_and_training_leaves_its_codes(way: str, tmp_path: Path) -> None:
    # In training mode throughout: on some CPUs bitsandbytes repacks 4-bit weights when it evaluates.
    model = quantized(tmp_path, way).train()
    with torch.no_grad():
        before = model(IDS).logits
    adapters = inject(model, LoRAConfig(r=4))
    initialize(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    codes = {name: layer.base_layer.weight.clone() for name, layer in adapters.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(layer.base_layer.weight, codes[name]) for name, layer in adapters.items())
    with torch.no_grad(), adapters_disabled(model):
        assert torch.equal(model(IDS).logits, before)


def test_codes_stay_in_place_when_the_model_evaluates_on_any_cpu(tmp_path: Path) -> None:
    model = quantized(tmp_path, "nf4")
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = True  # which would repack them, for products without a gradient
    inject(model, LoRAConfig(r=4))
    initialize(model)
    with torch.no_grad():
        before = model.eval()(IDS).logits
    model.train()(IDS, labels=IDS).loss.backward()
    for name, layer in lora_layers(model).items():
        assert layer.lora_A.grad.any(), name
        assert not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


def test_factors_are_those_of_the_dequantized_weight(tmp_path: Path) -> None:
    model = quantized(tmp_path, "nf4")
    inject(model, LoRAConfig(r=4))
    initialize(model)
    for layer in lora_layers(model).values():
        U, S, Vh = torch.linalg.svd(dense_weight(layer).double(), full_matrices=False)
        expected = U[:, -4:] * S[-4:] @ Vh[-4:]
        assert ((layer.lora_B @ layer.lora_A) - expected).norm() <= 1e-5 * expected.norm()


def test_lightnings_plugin_says_that_it_needs_cuda(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(RuntimeError, match="only supported on CUDA"):
        quiet_trainer(tmp_path, plugins=BitsandbytesPrecision("nf4"), callbacks=[MiLoRAInit(r=4)])


class Built(LanguageModel):
    """Built in ``__init__``, so that Lightning's plugin quantizes it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = tiny_model()


Built.configure_model = LightningModule.configure_model  # type: ignore[method-assign]


def assert_factors_of_the_full_weight(lm: LightningModule) -> None:
    reference, layers = tiny_model(), lora_layers(lm)
    assert len(layers) > 2
    for name, layer in layers.items():
        assert type(layer.base_layer) is not nn.Linear
        weight = reference.get_submodule(name.removeprefix("lm.")).weight.to(layer.lora_A.device)
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        expected = U[:, -4:] * S[-4:] @ Vh[-4:]
        assert (layer.initial_B @ layer.initial_A - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("ignored", [{"lm_head"}, set()])
def test_lightnings_plugin_quantizes_after_factors_are_computed(ignored: set[str], tmp_path: Path) -> None:
    """Without a GPU it replaces the layers, and leaves quantizing them to their way to one."""
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(r=4)])
    trainer.strategy._precision_plugin = BitsandbytesPrecision("nf4", torch.float32, ignored)
    lm = Built()
    with suppress(Exception) if not torch.cuda.is_available() else nullcontext():
        trainer.fit(lm)
    assert_factors_of_the_full_weight(lm)


def test_lightnings_plugin_is_refused_where_it_quantizes_while_the_model_is_built(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(r=4)])
    trainer.strategy._precision_plugin = BitsandbytesPrecision("nf4", torch.float32)
    with pytest.raises(ValueError, match="quantizes what configure_model builds before factors can be computed"):
        trainer.fit(LanguageModel())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_lightnings_plugin_gets_factors_of_the_full_weight(tmp_path: Path) -> None:
    """Would catch factors of codes, or of a weight that the plugin has quantized on its way to the GPU."""
    plugin = BitsandbytesPrecision("nf4", dtype=torch.bfloat16, ignore_modules={"lm_head"})
    lm = Built()
    trainer = quiet_trainer(tmp_path, max_steps=1, plugins=plugin, callbacks=[MiLoRAInit(r=4)], accelerator="cuda")
    trainer.fit(lm)
    assert_factors_of_the_full_weight(lm)


def test_checkpoint_leaves_scales_out_and_merging_is_refused(tmp_path: Path) -> None:
    class Quantized(LanguageModel):
        def configure_model(self) -> None:
            if self.lm is None:
                self.lm = quantized(tmp_path / "base", "nf4").train()

    lm = Quantized()
    trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[MiLoRAInit(r=4)])
    trainer.fit(lm)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    assert {key.rsplit(".", 1)[-1] for key in lm.state_dict()} == {"lora_A", "lora_B", "initial_A", "initial_B", KEY}
    fresh = Quantized()
    fresh.configure_model()
    load_adapter(fresh, tmp_path / "trained.ckpt")
    with torch.no_grad():
        assert torch.equal(fresh.train()(IDS), lm.train()(IDS))
    with pytest.raises(ValueError, match="cannot be merged"):
        export_merged(lm, tmp_path / "merged")
    export_peft(lm, tmp_path / "peft")
    full = tiny_model()
    load_peft(full, tmp_path / "peft")
    for name, layer in lora_layers(full).items():
        delta = lora_layers(lm)[f"lm.{name}"].delta_weight()
        torch.testing.assert_close(layer.delta_weight(), delta, rtol=1e-4, atol=1e-6)


def test_other_quantization_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, LoRAConfig(r=2))
    model[0].base_layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer '0' cannot be decomposed: its Linear holds torch.int8 codes"):
        initialize(model)
