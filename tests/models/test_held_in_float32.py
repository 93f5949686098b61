"""A half-precision model where the processor has no such products: the same numbers, held in float32."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer, tiny_model, tiny_tokenizer, write_examples
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule, load_for_inference
from milora_lightning.checkpoint.fingerprint import fingerprint
from milora_lightning.checkpoint.io import CheckpointError
from milora_lightning.cli.commands.export import export
from milora_lightning.data import Files
from milora_lightning.models.processor import held_as
from milora_lightning.utils.compat.torch import PRODUCTS_ON_X86

HALF = torch.bfloat16


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that this machine has, or has no, instructions for products in half precision."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    def become(fast: bool) -> None:
        for names in PRODUCTS_ON_X86.values():
            for name in names:
                monkeypatch.setattr(torch.cpu, name, lambda: fast, raising=False)

    become(False)
    return become


def save_base(folder: Path, dtype: torch.dtype = HALF) -> Path:
    tiny_model(dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def data(folder: Path, base: Path) -> SFTDataModule:
    rows = str(write_examples(folder / "rows.jsonl", 8))
    options: dict[str, Any] = {"num_generation_examples": 0, "num_test_generation_examples": 0}
    return SFTDataModule(Files(rows, validation=rows, test=rows), str(base), "plain", max_length=64, **options)


def train(folder: Path, base: Path, dtype: Any = "auto", adapters: bool = True) -> CausalLMModule:
    lm = CausalLMModule(str(base), dtype, warmup_steps=0)
    trainer = quiet_trainer(
        folder, max_steps=1, num_sanity_val_steps=0, limit_val_batches=0, callbacks=[MiLoRAInit(r=2)] * adapters
    )
    trainer.fit(lm, data(folder, base))
    trainer.save_checkpoint(folder / "a.ckpt")
    return lm


def exported(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())["dtype"]


@pytest.mark.parametrize("trained_on_fast", [False, True])
def test_a_checkpoint_fits_its_base_whatever_holds_it(
    trained_on_fast: bool, processor: Any, base: Path, tmp_path: Path
) -> None:
    processor(trained_on_fast)
    lm = train(tmp_path, base)
    held = HALF if trained_on_fast else torch.float32
    assert lm.model.dtype == held
    pretrained = AutoModelForCausalLM.from_pretrained(base, dtype=HALF).state_dict()
    for name, weight in lm.model.state_dict().items():
        if (plain := name.replace(".base_layer", "")) in pretrained:
            assert torch.equal(weight.float(), pretrained[plain].float())

    merged = []
    for fast in (False, True):
        processor(fast)
        model, _ = load_for_inference(tmp_path / "a.ckpt", device="cpu")
        assert model.dtype == (HALF if fast else torch.float32)
        trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=2)])
        trainer.test(CausalLMModule(str(base)), data(tmp_path, base), tmp_path / "a.ckpt", verbose=False)
        export(str(tmp_path / "a.ckpt"), str(tmp_path / f"merged{fast}"), "merged")
        merged.append(exported(tmp_path / f"merged{fast}"))
    assert merged[0][1] == merged[1][1] == "bfloat16"
    assert all(torch.equal(merged[0][0][name], weight) for name, weight in merged[1][0].items())

    other = tiny_model(dtype=HALF)  # negative control: another base, in either dtype
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    other.save_pretrained(base)
    for fast in (False, True):
        processor(fast)
        with pytest.raises(CheckpointError, match=r"another base model: 1 of \d+ frozen weights differ"):
            load_for_inference(tmp_path / "a.ckpt", device="cpu")


def test_an_export_at_the_end_of_training_is_that_of_the_checkpoint(processor: Any, base: Path, tmp_path: Path) -> None:
    from milora_lightning.export.folders import export_merged

    lm = train(tmp_path, base)
    export_merged(lm, tmp_path / "live")
    export(str(tmp_path / "a.ckpt"), str(tmp_path / "later"), "merged")
    (live, dtype), (later, dtype_later) = exported(tmp_path / "live"), exported(tmp_path / "later")
    assert dtype == dtype_later == "bfloat16"
    assert all(torch.equal(live[name], weight) for name, weight in later.items())


def test_fast_rounds_to_bfloat16_everywhere(processor: Any, tmp_path: Path) -> None:
    """So a float32 model is the same on all machines; and a base that was trained on in bfloat16 is that one."""
    base = save_base(tmp_path / "base", torch.float32)
    processor(True)
    train(tmp_path, base, "bfloat16")
    processor(False)
    model, _ = load_for_inference(tmp_path / "a.ckpt", device="cpu", dtype="fast")
    assert model.dtype == torch.float32
    weight = AutoModelForCausalLM.from_pretrained(base, dtype=HALF).lm_head.weight
    assert torch.equal(model.lm_head.weight, weight.float())
    with pytest.raises(CheckpointError, match="frozen weights differ"):  # negative control: not rounded
        load_for_inference(tmp_path / "a.ckpt", device="cpu", dtype="float32")


def test_a_named_dtype_is_obeyed_with_a_warning(processor: Any, base: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no instructions for products in bfloat16"):
        lm = train(tmp_path, base, "bfloat16")
    assert lm.model.dtype == HALF
    with pytest.warns(UserWarning, match="--dtype fast"):
        model, _ = load_for_inference(tmp_path / "a.ckpt", device="cpu")
    assert model.dtype == HALF


def test_weights_that_train_in_full_keep_their_dtype(processor: Any, base: Path, tmp_path: Path) -> None:
    """A checkpoint in float32 would be rounded where the model is loaded in the dtype of its files."""
    with pytest.warns(UserWarning, match="no instructions for products in bfloat16"):
        lm = train(tmp_path, base, adapters=False)
    assert lm.model.dtype == HALF


@pytest.mark.parametrize("fast", [False, True])
def test_what_is_expected_is_what_is_held(fast: bool, processor: Any) -> None:
    processor(fast)
    half = HALF if fast else torch.float32
    assert held_as("auto", HALF, "cpu") == held_as("fast", torch.float32, "cpu") == half
    assert held_as("bfloat16", torch.float32, "cpu") == held_as("auto", HALF, "cuda") == HALF
    assert held_as("auto", torch.float32, "cpu") == torch.float32


def test_a_fingerprint_in_another_dtype_needs_the_same_numbers() -> None:
    half = torch.nn.Linear(3, 2).to(HALF).requires_grad_(False)
    wide = torch.nn.Linear(3, 2).requires_grad_(False)
    wide.load_state_dict(half.state_dict())
    prints = fingerprint(half), fingerprint(wide)
    assert prints[0] != prints[1]
    assert fingerprint(half, like=prints[1]) == prints[1]
    assert fingerprint(wide, like=prints[0]) == prints[0]
    wide.weight[0, 0] += 1e-6
    assert fingerprint(wide, like=prints[0])["weight"] != prints[0]["weight"]
    assert fingerprint(wide, like=prints[0])["bias"] == prints[0]["bias"]
