"""Models whose files hold codes and that are dequantized while they are loaded: adapters and merged exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.exports import logits, move
from helpers.models import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from milora_lightning import LoRAConfig, export_merged, export_peft, initialize, inject, load_peft, lora_layers
from milora_lightning.models.pretrained import load_causal_lm

BLOCK = 8
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "dequantize": True}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]}


def as_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    if weight.ndim != 2 or "layers" not in name or name.endswith("gate.weight"):
        return {name: weight}
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 400
    codes = (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scales}


def as_mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    if weight.ndim != 3:
        return {name: weight}
    experts, columns, rows = weight.shape
    codes = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.full((experts, rows, columns // 32), 122, dtype=torch.uint8)  # 2⁻⁵
    return {f"{name}_blocks": codes, f"{name}_scales": scales}


CASES: dict[str, tuple[str, dict[str, object], Callable[[str, Tensor], dict[str, Tensor]], dict[str, int]]] = {
    "fp8": ("llama", FP8, as_fp8, {}),
    "fp8 experts": ("qwen3_moe", FP8, as_fp8, {}),
    "mxfp4 experts": ("gpt_oss", MXFP4, as_mxfp4, {"intermediate_size": 32}),
}


def save(case: str, folder: Path) -> Path:
    kind, quantization, quantize, sizes = CASES[case]
    tiny_model(kind, **sizes).save_pretrained(folder)
    files = load_file(folder / "model.safetensors")
    codes = {key: value for name, weight in files.items() for key, value in quantize(name, weight).items()}
    save_file(codes, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_what_was_dequantized_is_merged_and_written_without_codes(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers would write FP8 codes again, without saying so in the configuration, or MXFP4's names."""
    model = load_causal_lm(str(save(case, tmp_path / "base")), "float32")
    said = caplog.text + capsys.readouterr().err
    assert ("MXFP4 codes, which cannot be trained with: dequantized to float32" in said) == ("mxfp4" in case)
    start = logits(model)
    inject(model, LoRAConfig(r=2))
    initialize(model, cache=False)
    assert torch.equal(logits(model), start)
    assert any("experts" in name for name in lora_layers(model)) == ("experts" in case)
    move(model)
    assert (logits(model) - start).abs().max() > 1e-3
    assert export_merged(model, tmp_path / "merged") < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    kind, _, _, sizes = CASES[case]
    tiny_model(kind, **sizes).save_pretrained(tmp_path / "plain")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as there:
        assert set(there.keys()) == load_file(tmp_path / "plain" / "model.safetensors").keys()

    export_peft(model, tmp_path / "peft")
    again = load_causal_lm(str(tmp_path / "base"), "float32")
    load_peft(again, tmp_path / "peft")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
