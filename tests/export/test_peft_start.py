"""PEFT's own layers, filled with this package's starts: exact, and saved by PEFT as plain adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import IDS
from helpers.models import quiet_trainer, tiny_model
from lightning.pytorch import LightningModule
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from milora_lightning import (
    LoRAConfig,
    MiLoRAInit,
    initialize,
    initialize_peft,
    inject,
    load_peft,
    lora_layers,
    register_start,
)

NAMES = ["q_proj", "down_proj"]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def filled(init: str = "milora", kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    model = get_peft_model(tiny_model(kind, dtype), LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    assert initialize_peft(model, init=init, cache=False) > 0
    return model


def ours(init: str = "milora", kind: str = "llama", **options: Any) -> nn.Module:
    model = tiny_model(kind)
    inject(model, LoRAConfig(**{"r": 4, "lora_alpha": 6, "target_modules": NAMES, "init": init, **options}))
    initialize(model, cache=False)
    return model


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        loss = model.train()(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("init", ["milora", "pissa", "random", "lora", "mica", "olora"])
def test_they_start_train_and_are_saved_as_ours(init: str, tmp_path: Path) -> None:
    model, base = filled(init, target_modules=NAMES, lora_dropout=0.0), tiny_model()
    assert torch.equal(logits(model), logits(base))
    theirs, mine = logits(train(model)), logits(train(ours(init)))
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)
    assert (theirs - logits(base)).abs().max() > 1e-2
    now = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(p, now[n]) for n, p in base.named_parameters())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(opened), theirs, rtol=0, atol=1e-5)
    assert opened.peft_config["default"].r == (4 if init in ("lora", "mica") else 8)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.partition("lora_")[2] for key in saved} == {"A.weight", "B.weight"}
    merged, unloaded = copy.deepcopy(model).merge_and_unload(), copy.deepcopy(model).unload()
    torch.testing.assert_close(logits(merged), theirs, rtol=0, atol=1e-5)
    assert merged.state_dict().keys() == unloaded.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": NAMES, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.mlp.down_proj": 9}},
        {"target_modules": NAMES, "use_rslora": True},
        {"target_modules": "all-linear", "lora_dropout": 0.3},
        {"kind": "gpt2", "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ],
)
def test_patterns_scales_and_layouts(options: dict[str, Any], tmp_path: Path) -> None:
    kind = options.pop("kind", "llama")
    model, base = filled(kind=kind, **options), tiny_model(kind)
    outputs = []
    for each in (model, base):
        torch.manual_seed(0)  # of GPT-2's own dropout
        outputs.append(each.train()(IDS).logits)
    assert torch.equal(*outputs)
    for layer in (m for m in model.modules() if hasattr(getattr(m, "base_layer", None), "started")):
        U, S, Vh = torch.linalg.svd(layer.get_base_layer().weight.double(), full_matrices=False)
        r = layer.r["default"] // 2
        got = layer.scaling["default"] * layer.base_layer.started.B.double() @ layer.base_layer.started.A.double()
        want = U[:, -r:] * S[-r:] @ Vh[-r:]
        torch.testing.assert_close(got.T if kind == "gpt2" else got, want, rtol=0, atol=1e-6)
    want = logits(train(model))
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(tiny_model(kind), tmp_path)
    torch.testing.assert_close(logits(opened), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["PEFT's float32", "PEFT's bfloat16", "cast"])
def test_half_precision_starts_exactly_and_loses_no_steps(how: str) -> None:
    options: dict[str, Any] = {} if how == "PEFT's float32" else {"autocast_adapter_dtype": False}
    config = LoraConfig(r=4, target_modules=NAMES)
    base = tiny_model(dtype=torch.bfloat16)
    model = get_peft_model(copy.deepcopy(base), config, **options)
    initialize_peft(model, cache=False)
    for each in (base, model) if how == "cast" else ():  # as by precision: bf16-true
        each.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    factors = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in factors]
    model(IDS, labels=IDS).loss.backward()
    torch.optim.Adam(factors, lr=1e-6).step()
    assert all(
        p.dtype == torch.float32 and (p != old).float().mean() > 0.99 for p, old in zip(factors, before, strict=True)
    )
    merged = copy.deepcopy(model).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_states_are_complete_and_others_are_refused() -> None:
    model = train(filled(target_modules=NAMES))
    other = filled(target_modules=NAMES)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(train(other, 1)), logits(train(model, 1)))
    plain = {k: v for k, v in model.state_dict().items() if "started" not in k}
    with pytest.raises(RuntimeError, match="open it in a model without initialize_peft"):
        other.load_state_dict(plain, strict=False)


def test_a_saved_adapter_opens_here_and_beside_another_that_stays(tmp_path: Path) -> None:
    model = train(filled(target_modules=NAMES))
    want = logits(model)
    model.save_pretrained(tmp_path)
    opened = tiny_model()
    load_peft(opened, tmp_path)
    torch.testing.assert_close(logits(opened), want, rtol=0, atol=1e-5)
    other = filled("pissa", target_modules=NAMES)
    before = logits(train(other, 1))
    other.load_adapter(tmp_path, "b")
    assert torch.equal(logits(other), before)
    other.set_adapter("b")
    torch.testing.assert_close(logits(other), want, rtol=0, atol=1e-5)
    assert not any("started" in name for name, p in other.named_parameters() if p.requires_grad)
    other.set_adapter("default")
    assert {name.split(".")[-1] for name, p in other.named_parameters() if p.requires_grad} == {"A", "B"}
    assert torch.equal(logits(other), before)
    other.delete_adapter("default")
    assert not any("started" in name for name in other.state_dict())
    other.set_adapter("b")
    torch.testing.assert_close(logits(other.merge_and_unload()), want, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="open it in a model without initialize_peft"):
        model.load_adapter(tmp_path, "default")


def test_a_frozen_factor_of_a_users_start_stays() -> None:
    @register_start("rows", frozen="lora_B")
    def rows(weight: Tensor, r: int, statistics: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return weight[:r].clone(), torch.eye(len(weight), r)

    model = filled("rows", target_modules=NAMES)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"A"}


def refused(match: str, model: nn.Module, **options: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        initialize_peft(model, cache=False, **options)
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(value, now[name]) for name, value in before.items())


def test_what_cannot_be_filled_is_refused() -> None:
    def peft(**options: Any) -> PeftModel:
        return get_peft_model(tiny_model(), LoraConfig(**{"r": 4, "target_modules": NAMES, **options}))

    refused("has no PEFT layers", tiny_model())
    with pytest.raises(ValueError, match="init='eva' is computed from data, which initialize_peft does not take"):
        initialize_peft(peft(), init="eva")
    refused("has been trained", train(peft()))
    refused("has been filled already", filled(target_modules=NAMES))
    refused("changed the base weights for init_lora_weights='pissa'", peft(init_lora_weights="pissa"))
    refused("DoRA", peft(use_dora=True))
    refused("is not that of a linear layer", peft(target_modules=["embed_tokens"]))
    refused("has r=64, and its weight has", peft(r=64))
    with pytest.raises(ValueError, match="unknown"):
        initialize_peft(peft(), init="unknown")
    assert initialize_peft(peft(r=64), init="lora") == 4


class Tuned(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = filled(target_modules=NAMES)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(IDS, labels=IDS).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(1))


def test_a_run_is_resumed_and_the_callback_names_both_ways(tmp_path: Path) -> None:
    def fit(steps: int, ckpt: Path | None = None) -> Tuned:
        module = Tuned()
        trainer = quiet_trainer(tmp_path, max_steps=steps)
        trainer.fit(module, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    whole = fit(4)
    fit(2)
    assert torch.equal(logits(fit(4, tmp_path / "2.ckpt").model), logits(whole.model))
    assert not lora_layers(whole)
    with pytest.raises(ValueError, match=r"leave out get_peft_model.*or leave out MiLoRAInit.*initialize_peft"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(r=2)]).fit(Tuned())


def test_random_starts_are_drawn_by_their_seed_and_the_layers_names_as_ours_are() -> None:
    def of_peft(seed: int) -> list[Tensor]:
        model = get_peft_model(tiny_model(), LoraConfig(r=4, lora_alpha=6, target_modules=NAMES))
        initialize_peft(model, "gaussian x unit", seed=seed, cache=False)
        return [m.A.detach() for m in model.modules() if hasattr(m, "initial_A") and hasattr(m, "A")]

    mine = tiny_model()
    inject(mine, LoRAConfig(r=4, lora_alpha=6, target_modules=NAMES, init="gaussian x unit"))
    initialize(mine, seed=5, cache=False)
    expected = [layer.lora_A.detach() for layer in lora_layers(mine).values()]
    assert all(torch.equal(x, y) for x, y in zip(of_peft(5), expected, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(of_peft(0), expected, strict=True))
