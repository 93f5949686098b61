"""Exports open in bases that are quantized while they are loaded, as users train and serve them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.exports import logits, tuned

from milora_lightning import adapters_disabled, export_peft, load_peft, lora_layers
from milora_lightning.models.pretrained import load_causal_lm


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_folder_is_the_same_update_on_a_quantized_base(quantization: str, tmp_path: Path) -> None:
    trained = tuned(tmp_path / "base")
    export_peft(trained, tmp_path / "peft")
    model = load_causal_lm(str(tmp_path / "base"), quantization=quantization)
    plain = logits(model)
    load_peft(model, tmp_path / "peft")
    assert lora_layers(model).keys() == lora_layers(trained).keys()
    for ours, theirs in zip(lora_layers(model).values(), lora_layers(trained).values(), strict=True):
        x = torch.randn(3, ours.in_features)
        torch.testing.assert_close(ours.update(x), theirs.update(x), rtol=1e-4, atol=1e-5)
    with adapters_disabled(model):
        torch.testing.assert_close(logits(model), plain)
    assert (logits(model) - plain).abs().max() > 0.1
