"""Analysis and exports of every start that needs no data, and of updates whose intruders are shrunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.exports import logits, move, tuned
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from milora_lightning import LoRAConfig, export_merged, export_peft, initialize, inject, lora_layers
from milora_lightning.analysis.intruders import Intruders, corrections
from milora_lightning.analysis.spectra import analyze_model
from milora_lightning.export.merging import merged_state

STARTS = ["mica", "olora", "orthogonal", "minor x principal x 0.5"]


@pytest.mark.parametrize("init", STARTS)
def test_what_is_analyzed_and_exported_is_what_the_model_computes(init: str, tmp_path: Path) -> None:
    model = tuned(tmp_path / "base", "llama", torch.float32, init=init)
    live = logits(model)
    export_merged(model, tmp_path / "merged")
    export_peft(model, tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(base) - live).abs().max() > 0.1
    for opened in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        PeftModel.from_pretrained(base, tmp_path / "peft"),
    ):
        torch.testing.assert_close(logits(opened), live, rtol=0, atol=1e-5)

    layers, found = lora_layers(model), analyze_model(model)
    assert {matrix.layer for matrix in found} == set(layers)
    for matrix in found:
        layer = layers[matrix.layer]
        delta, weight = layer.delta_weight().detach().double(), layer.base_layer.weight.double()
        S = torch.linalg.svdvals(delta)
        assert matrix.relative_norm == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-4)
        torch.testing.assert_close(
            matrix.delta_singular_values, S[: len(matrix.delta_singular_values)], rtol=1e-3, atol=0
        )
        assert len(matrix.delta_singular_values) <= (layer.r if init == "mica" else 2 * layer.r)


def test_intruders_are_shrunk_alike_in_both_formats(tmp_path: Path) -> None:
    model = tuned(tmp_path / "base", "llama", torch.float32, init="milora")
    rule = Intruders(keep=0.25, threshold=0.9)
    layers = lora_layers(model)
    found = corrections(layers, rule)
    assert len(found) > 2
    live = logits(model)
    export_merged(model, tmp_path / "merged", shrink_intruders=rule)
    export_peft(model, tmp_path / "peft", shrink_intruders=rule)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    torch.testing.assert_close(logits(peft), logits(merged), rtol=0, atol=1e-5)
    assert (logits(merged) - live).abs().max() > 0.01
    assert torch.equal(logits(model), live)
    for name, layer in layers.items():
        expected = layer.base_layer.weight + layer.delta_weight()
        if layer in found:
            left, right = found[layer]
            expected = expected + left @ right
        torch.testing.assert_close(merged.get_submodule(name).weight, expected)
    # Compressed to a rank between that of the adapters and that of what shrinking has made of them.
    most = max(2 * layer.r + len(right) for layer, (_, right) in found.items())
    assert export_peft(model, tmp_path / "cut", rank=most - 1, shrink_intruders=rule) < 0.05
    cut = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "cut")
    assert (logits(cut) - logits(merged)).abs().max() < 0.1 * (logits(merged) - live).abs().max()


def test_intruders_of_packed_attention_are_shrunk_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    inject(model, LoRAConfig(r=2))
    initialize(model, cache=False)
    move(model)
    layer = lora_layers(model)["0.in_proj"]
    left, right = torch.randn(24, 1), torch.randn(1, 8)
    state, _ = merged_state(model, None, corrections={layer: (left, right)})
    want = layer.base_layer.weight + layer.delta_weight() + left @ right
    torch.testing.assert_close(state["0.in_proj_weight"], want)
