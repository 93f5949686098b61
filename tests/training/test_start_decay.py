"""Factors decay towards their start, as much as they are told to and where their optimizer steps; and LoRA+."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import train
from helpers.models import quiet_trainer, save_tiny_model
from helpers.modules import data, module
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from milora_lightning import LoRAConfig, LoRALinear, MiLoRAInit, initialize, inject, lora_layers
from milora_lightning.adapters.settings import configured_settings, first_difference, settings_of
from milora_lightning.training.lora_plus import make_optimizer
from milora_lightning.training.resuming import check_same
from milora_lightning.training.schedules import make_schedule, set_rate
from milora_lightning.training.start_decay import decay_to_start, decaying_factors, warn_of_weight_decay


def moved(init: str = "milora") -> tuple[nn.Module, LoRALinear]:
    """An adapted layer that is away from its start, with gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24))
    (layer,) = inject(model, LoRAConfig(r=4, init=init)).values()
    initialize(model)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            if factor.requires_grad:
                factor.add_(torch.randn(factor.shape))
    model(torch.randn(5, 16)).square().mean().backward()
    return model, layer


def stepped(optimizer: Any, init: str = "milora", rate: float = 0.0) -> dict[str, Tensor]:
    model, layer = moved(init)
    made = optimizer([p for p in model.parameters() if p.requires_grad])
    if rate:
        decay_to_start(model, [made], rate)
    made.step()
    return {name: p.detach().clone() for name, p in layer.named_parameters(recurse=False)}


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.0),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.0, fused=True),
    "tensor": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("init", ["milora", "gaussian x minor", "lora", "mica"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_step_is_followed_by_its_decay(optimizer: str, init: str) -> None:
    plain, decayed = (stepped(OPTIMIZERS[optimizer], init, rate) for rate in (0.0, 0.5))
    for name, p in plain.items():
        start = plain.get(name.replace("lora", "initial"), torch.zeros_like(p))
        kept = name.startswith("initial") or (init, name) in {("lora", "lora_A"), ("mica", "lora_B")}
        expected = p if kept else p - 0.1 * 0.5 * (p - start)
        torch.testing.assert_close(decayed[name], expected, rtol=0, atol=1e-6)
        assert torch.equal(decayed[name], p) == kept


@pytest.mark.parametrize("skip", [True, False])
def test_nothing_decays_in_a_step_that_a_fused_optimizer_skips(skip: bool) -> None:
    """As gradient scaling has it: the step is called, and its kernel leaves everything as it was."""
    model, layer = moved()
    optimizer = OPTIMIZERS["fused"]([p for p in model.parameters() if p.requires_grad])
    decay_to_start(model, [optimizer], 0.5)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(float(skip))
    before = layer.lora_A.detach().clone()
    optimizer.step()
    assert torch.equal(layer.lora_A, before) == skip


def test_factors_without_a_gradient_do_not_decay() -> None:
    model, layer = moved()
    layer.lora_A.grad = None
    optimizer = OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad])
    decay_to_start(model, [optimizer], 0.5)
    before = layer.lora_A.detach().clone()
    optimizer.step()
    assert torch.equal(layer.lora_A, before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


class Small(LightningModule):
    def __init__(self, weight_decay: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.weight_decay = nn.Linear(16, 24), weight_decay

    def training_step(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2, weight_decay=self.weight_decay)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(6, 16), batch_size=2)  # type: ignore[arg-type]


def run(folder: Path, weight_decay: float, **adapter: Any) -> tuple[Small, list[str]]:
    lm = Small(weight_decay)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(folder, max_epochs=1, callbacks=[MiLoRAInit(r=4, seed=0, **adapter)]).fit(lm)
    return lm, [str(w.message) for w in caught if "weight_decay" in str(w.message)]


def distance(lm: nn.Module) -> float:
    return sum((layer.lora_A - layer.initial_A).detach().norm().item() for layer in lora_layers(lm).values())


def test_a_run_stays_nearer_to_its_start(tmp_path: Path) -> None:
    free, said = run(tmp_path, 0.1)
    assert len(said) == 1
    assert "decay_to_start" in said[0]
    held, said = run(tmp_path, 0.0, decay_to_start=30.0)
    assert said == []
    assert distance(held) < 0.8 * distance(free)
    assert not held.trainer.optimizers[0]._optimizer_step_post_hooks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for init in ("lora", "mica"):  # what decays to zero there has started at zero
            model, _ = moved(init)
            warn_of_weight_decay(model, [torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)])


def test_what_cannot_decay_is_refused(llama: Path, tmp_path: Path) -> None:
    for options in ({"decay_to_start": -1.0}, {"decay_to_start": 0.1, "init": "full"}, {"decay_to_start": math.nan}):
        with pytest.raises(ValueError, match="decay_to_start"):
            MiLoRAInit(**options)
    model, _ = moved()
    with pytest.raises(ValueError, match="none that holds them"):
        decay_to_start(model, [], 0.1)
    callback = MiLoRAInit(decay_to_start=0.1)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(ValueError, match=r"decay_to_start does not work under .*FSDPStrategy"):
        callback.setup(trainer, module(llama), "fit")
    assert decaying_factors(nn.Linear(2, 2)) == {}


def test_schedules_keep_the_ratio_where_a_rate_is_changed() -> None:
    model, _ = moved()
    optimizer = make_optimizer(OPTIMIZERS["sgd"], model, 4.0)
    schedule = make_schedule("linear", optimizer, 0, {}, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.2])
    set_rate(optimizer, schedule, 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 2.0])


def test_a_ratio_that_cannot_be_is_refused(llama: Path, tmp_path: Path) -> None:
    model, _ = moved("mica")
    with pytest.raises(ValueError, match="no B trains"):
        make_optimizer(OPTIMIZERS["sgd"], model, 4.0)
    model, _ = moved()
    with pytest.raises(ValueError, match="must be positive"):
        make_optimizer(OPTIMIZERS["sgd"], model, 0.0)
    with pytest.raises(ValueError, match="several groups"):
        make_optimizer(torch.optim.LBFGS, model, 4.0)


def test_a_resumed_run_says_that_it_decays_otherwise(tmp_path: Path) -> None:
    def resumed(epochs: int, ckpt: str | None, **adapter: Any) -> list[str]:
        trainer = quiet_trainer(tmp_path, max_epochs=epochs, callbacks=[MiLoRAInit(r=4, seed=0, **adapter)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(Small(0.0), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return [str(w.message) for w in caught if "decay_to_start" in str(w.message)]

    assert resumed(1, None, decay_to_start=0.5) == []
    assert resumed(2, str(tmp_path / "1.ckpt"), decay_to_start=0.5) == []
    (said,) = resumed(3, str(tmp_path / "2.ckpt"))
    assert "was trained with decay_to_start=0.5, and this run goes on with 0" in said
    assert resumed(4, str(tmp_path / "3.ckpt")) == []


def test_b_has_a_rate_of_its_own_also_in_a_resumed_run(llama: Path, tmp_path: Path) -> None:
    assert len(make_optimizer(OPTIMIZERS["sgd"], moved()[0], 1.0).param_groups) == 1
    lm = module(llama, loraplus_lr_ratio=4.0, learning_rate=0.01)
    path = train(tmp_path, lm, data(tmp_path, llama))
    groups, layers = lm.trainer.optimizers[0].param_groups, lora_layers(lm).values()
    assert [group["initial_lr"] for group in groups] == [0.01, 0.04]
    assert set(groups[0]["params"]) == {layer.lora_A for layer in layers}
    assert set(groups[1]["params"]) == {layer.lora_B for layer in layers}
    saved = torch.load(path, weights_only=True)
    check_same(saved, lm.trainer.optimizers[0], None)
    with pytest.raises(ValueError, match="same loraplus_lr_ratio"):
        check_same(saved, torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad]), None)


def test_the_scale_of_rslora() -> None:
    config = LoRAConfig(r=16, lora_alpha=8, use_rslora=True, rank_pattern={"b": 4})
    assert (config.scaling, config.scale("a"), config.scale("b")) == (2.0, 2.0, 4.0)
    assert LoRAConfig(r=16, use_rslora=True).scale("a") == 4.0
    model = nn.ModuleDict({"a": nn.Linear(32, 32)})
    (layer,) = inject(model, config.__class__(r=16, lora_alpha=8, use_rslora=True)).values()
    assert layer.scaling == 2.0
    assert first_difference(configured_settings(config, "a", 32), settings_of(layer)) is None
