"""Lightning's averages of weights: of the adapters, wherever the callback stands, and never of the base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import quiet_trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from milora_lightning import CheckpointError, LoRAConfig, MiLoRAInit, inject, load_adapter, lora_layers
from milora_lightning.checkpoint.adapter import KEY, AdapterCheckpoint
from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.training.averaging import check_averaging

DECAY = 0.5


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)).to(dtype)
    net.register_buffer("constant", torch.randn(8, dtype=dtype))
    return net


class Built(LightningModule):
    """A module built in ``__init__``."""

    dtype_ = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module | None = network(self.dtype_)
        self.losses: list[Tensor] = []

    def step(self, batch: Tensor) -> Tensor:
        return F.mse_loss(self.net(batch.to(self.dtype_)).float(), batch.flip(1))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.losses.append(self.step(batch).detach())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.5)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), batch_size=4)

    val_dataloader = train_dataloader


class BuiltInSetup(Built):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def setup(self, stage: str) -> None:
        self.net = self.net or network(self.dtype_)


class BuiltInConfigureModel(BuiltInSetup):
    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        self.net = self.net or network(self.dtype_)


class Record(Callback):
    """Keeps the adapters after each step, and at the start of each epoch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.epochs.append(trained(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.steps.append(trained(pl_module))


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def averaging(kind: str) -> Callback:
    if kind == "swa":
        return StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    return EMAWeightAveraging(decay=DECAY) if kind == "ema" else WeightAveraging()


def average(kind: str, record: Record, name: str) -> Tensor:
    values = [state[name] for state in (record.epochs if kind == "swa" else record.steps)]
    if kind != "ema":
        return torch.stack(values).mean(0)
    mean = values[0]
    for value in values[1:]:
        mean = DECAY * mean + (1 - DECAY) * value
    return mean


def fit(
    folder: Path, module: Built, kind: str, first: bool, max_epochs: int = 3, ckpt_path: Any = None, **options: Any
) -> Record:
    milora, record = MiLoRAInit(r=2, cache=False), Record()
    callbacks = [milora, averaging(kind), record] if first else [averaging(kind), record, milora]
    saving = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    trainer = quiet_trainer(
        folder, callbacks=[*callbacks, saving], max_epochs=max_epochs, enable_checkpointing=True, **options
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    return record


@pytest.mark.parametrize("cls", [Built, BuiltInSetup, BuiltInConfigureModel])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["swa", "ema", "mean"])
def test_the_adapters_are_averaged_and_the_base_is_not_touched(
    kind: str, first: bool, cls: type[Built], tmp_path: Path
) -> None:
    # where there is normalisation, SWA adds an epoch to what this records: the test after this one is of its numbers
    module = cls()
    record = fit(tmp_path, module, kind, first)
    for name, value in trained(module).items():
        if kind != "swa":
            assert torch.allclose(value, average(kind, record, name), atol=1e-6), name
            assert not torch.equal(value, record.steps[-1][name])
    base, layers = network(), lora_layers(module)
    assert [*layers] == ["net.0", "net.3"]
    assert all(torch.equal(layers[f"net.{i}"].base_layer.weight, base[i].weight) for i in (0, 3))
    assert torch.equal(module.net.constant, base.constant)


class WithoutNorm(Built):
    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.Identity()


def test_swa_averages_the_adapters_of_its_epochs(tmp_path: Path) -> None:
    module = WithoutNorm()
    record = fit(tmp_path, module, "swa", False)
    for name, value in trained(module).items():
        assert torch.allclose(value, average("swa", record, name), atol=1e-6), name
        assert not torch.allclose(value, record.steps[-1][name], atol=1e-6)


class Half(BuiltInConfigureModel):
    dtype_ = torch.bfloat16


def test_rounding_does_not_wear_a_half_precision_base_away(tmp_path: Path) -> None:
    module, base = Half(), network(torch.bfloat16)
    weight = base[0].weight
    assert not torch.equal(0.9 * weight + (1 - 0.9) * weight, weight)  # what an average would make of it
    callbacks = [EMAWeightAveraging(decay=0.9), MiLoRAInit(r=2, cache=False)]
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(module)
    assert torch.equal(lora_layers(module)["net.0"].base_layer.weight, weight)
    assert torch.equal(module.net.constant, base.constant)


@pytest.mark.parametrize("kind", ["swa", "ema", "mean"])
def test_resumed_it_goes_on_as_if_it_had_not_been_interrupted(kind: str, tmp_path: Path) -> None:
    cls = WithoutNorm if kind == "swa" else BuiltInConfigureModel
    whole = cls()
    fit(tmp_path / "whole", whole, kind, False, max_epochs=4)
    resumed = cls()
    fit(tmp_path / "resumed", resumed, kind, True, max_epochs=4, ckpt_path=tmp_path / "whole" / "epoch=1.ckpt")
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(resumed)[name]), name


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_checkpoints_hold_the_average_of_the_adapters_and_no_base(kind: str, tmp_path: Path) -> None:
    module = BuiltInConfigureModel()
    fit(tmp_path, module, kind, False)
    checkpoint = read_checkpoint(tmp_path / "epoch=2.ckpt")
    (callback,) = [state for key, state in checkpoint["callbacks"].items() if "Averaging" in key]
    states = [checkpoint["state_dict"], callback["average_model_state"] if kind == "swa" else None]
    states.append(checkpoint.get("current_model_state"))
    for state in filter(None, states):
        assert not [key for key in state if "base_layer" in key]
        assert KEY in state
    if kind == "ema":
        fresh = Built()
        load_adapter(fresh, tmp_path / "epoch=2.ckpt")
        assert all(torch.equal(value, trained(fresh)[name]) for name, value in trained(module).items())


def test_averages_share_the_base(tmp_path: Path) -> None:
    callback, module = WeightAveraging(device="cpu"), BuiltInConfigureModel()
    quiet_trainer(tmp_path, callbacks=[callback, MiLoRAInit(r=2, cache=False)], max_epochs=1).fit(module)
    shared = set(module.parameters()) & set(callback._average_model.parameters())
    assert shared == {p for p in module.parameters() if not p.requires_grad}
    averages = lora_layers(callback._average_model.module)
    assert averages.keys() == lora_layers(module).keys()
    assert all(layer.initialized for layer in averages.values())  # as checkpoints say of them
    before = module.net[0].base_layer.weight.dtype
    callback._average_model.to(torch.float64)  # the average may be moved, and the module stays where it is
    assert module.net[0].base_layer.weight.dtype == before
    assert callback._average_model.module.net[0].lora_A.dtype == torch.float64


def test_validation_before_the_first_average_is_of_the_pretrained_model(tmp_path: Path) -> None:
    module, plain = Built(), Built().eval()
    ema = EMAWeightAveraging(update_starting_at_step=99)
    callbacks = [ema, MiLoRAInit(r=2, cache=False)]
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1, num_sanity_val_steps=0).fit(module)
    reference = [plain.step(batch).detach() for batch in plain.val_dataloader()]
    assert torch.allclose(torch.stack(module.losses), torch.stack(reference), atol=1e-5)


@pytest.mark.parametrize("first", [True, False], ids=["averaging before the monitor", "behind it"])
def test_monitors_measure_the_weights_whose_loss_is_logged(first: bool, tmp_path: Path) -> None:
    """The average, and not the weights that are training."""

    class Monitor(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
            self.training = trained(pl_module)

        def on_validation_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
            self.validated = trained(pl_module)

        def on_validation_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
            self.measured = trained(pl_module)

    monitor, ema = Monitor(), EMAWeightAveraging(decay=DECAY)
    both = [ema, monitor] if first else [monitor, ema]
    callbacks = [MiLoRAInit(r=2, cache=False), *both]
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1, num_sanity_val_steps=0).fit(WithoutNorm())
    for name, value in monitor.measured.items():
        assert torch.equal(value, monitor.validated[name])
        assert not torch.equal(value, monitor.training[name])


def test_sharded_weights_cannot_be_averaged(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[WeightAveraging()], strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="WeightAveraging needs whole weights"):
        check_averaging(trainer)
    check_averaging(quiet_trainer(tmp_path, callbacks=[WeightAveraging()]))


def adapted() -> Built:
    module = Built()
    config = LoRAConfig(r=2, target_modules=["0"])
    inject(module, config)
    AdapterCheckpoint.attach(module, config)
    with torch.no_grad():
        lora_layers(module)["net.0"].lora_A.normal_(generator=torch.Generator().manual_seed(len("adapted")))
    return module


def test_modules_that_hold_a_lightning_module_load_what_they_save() -> None:
    saved = nn.ModuleDict({"a": adapted(), "b": nn.ModuleDict({"c": adapted()}), "head": nn.Linear(2, 2)})
    state = saved.state_dict()
    assert not [key for key in state if "base_layer" in key]
    fresh = nn.ModuleDict({"a": adapted(), "b": nn.ModuleDict({"c": adapted()}), "head": nn.Linear(2, 2)})
    for parameter in fresh.parameters():
        if parameter.requires_grad:
            nn.init.zeros_(parameter)
    fresh.load_state_dict(state)
    assert all(torch.equal(value, trained(fresh)[name]) for name, value in trained(saved).items())
    # the base is excused, and nothing else
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head.weight"\.'):
        fresh.load_state_dict({key: value for key, value in state.items() if key != "head.weight"})
    with pytest.raises(CheckpointError, match=r"lacks 'b.c.net.0.lora_A'"):
        fresh.load_state_dict({key: value for key, value in state.items() if key != "b.c.net.0.lora_A"})


def test_a_copy_saves_and_loads_by_itself() -> None:
    module = adapted()
    double = copy.deepcopy(module)
    with torch.no_grad():
        double.net[0].lora_B.fill_(2)
    assert torch.equal(double.state_dict()["net.0.lora_B"], torch.full((8, 2), 2.0))
    assert not module.state_dict()["net.0.lora_B"].any()
    assert not set(module.parameters()) & set(double.parameters())
    double.load_state_dict(module.state_dict())
    assert not double.net[0].lora_B.any()
