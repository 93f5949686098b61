"""That an adapter has its initial values is saved with it, and not guessed from what they are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import quiet_trainer
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from milora_lightning import LoRAConfig, LoRALinear, MiLoRAInit, initialize, inject, load_adapter, lora_layers
from milora_lightning.checkpoint.adapter import KEY, AdapterCheckpoint

CONFIG = LoRAConfig(r=2)
STARTS = {"A zero": (0, 1), "B zero": (1, 0), "both zero": (0, 0)}


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def adapted() -> Module:
    module = Module()
    inject(module, CONFIG)
    return module


def started(start: tuple[int, int]) -> Module:
    module = adapted()
    for layer in lora_layers(module).values():
        layer.set_initial_factors(*(torch.full(f.shape, float(v)) for f, v in zip(layer.factors, start, strict=False)))
    return module


def through_file(state: object) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def by_state_dict(module: Module, folder: Path) -> Module:
    other = adapted()
    other.load_state_dict(through_file(module.state_dict()))
    return other


def by_description(module: Module, folder: Path) -> Module:
    """As a checkpoint in a folder, or one that other tools have rewritten: tensors and description, no metadata."""
    AdapterCheckpoint.attach(module, CONFIG)
    other = adapted()
    AdapterCheckpoint.attach(other, CONFIG)
    other.load_state_dict(dict(through_file(dict(module.state_dict()))))
    return other


def by_trainer(module: Module, folder: Path) -> Module:
    trainer = quiet_trainer(folder, callbacks=[MiLoRAInit(r=2)], limit_val_batches=0)
    trainer.strategy.connect(module)
    AdapterCheckpoint.attach(module, CONFIG)
    trainer.save_checkpoint(folder / "module.ckpt")
    other = Module()
    load_adapter(other, folder / "module.ckpt")
    return other


WAYS: dict[str, Callable[[Module, Path], Module]] = {
    "state_dict": by_state_dict,
    "description": by_description,
    "checkpoint": by_trainer,
    "deepcopy": lambda module, _: copy.deepcopy(module),
    "pickle": lambda module, _: pickle.loads(pickle.dumps(module)),
}


def check_kept(module: Module, other: Module) -> None:
    assert all(layer.initialized for layer in lora_layers(other).values())
    assert initialize(other) == 0
    for name, layer in lora_layers(module).items():
        for own, loaded in zip(layer.factors, lora_layers(other)[name].factors, strict=True):
            assert torch.equal(own, loaded)


@pytest.mark.parametrize("start", list(STARTS))
@pytest.mark.parametrize("way", list(WAYS))
def test_starts_of_zeros_are_kept(way: str, start: str, tmp_path: Path) -> None:
    module = started(STARTS[start])
    check_kept(module, WAYS[way](module, tmp_path))


@pytest.mark.parametrize("way", list(WAYS))
def test_what_was_saved_before_its_start_gets_it_after_loading(way: str, tmp_path: Path) -> None:
    """The negative control: also where the one that loads had its own already."""
    other = WAYS[way](adapted(), tmp_path)
    assert not any(layer.initialized for layer in lora_layers(other).values())
    assert initialize(other) == 2
    assert all(layer.lora_A.any() and layer.lora_B.any() for layer in lora_layers(other).values())


def test_some_with_and_some_without(tmp_path: Path) -> None:
    module = adapted()
    first, second = lora_layers(module).values()
    first.set_initial_factors(torch.zeros(2, 8), torch.zeros(6, 2))
    for way in WAYS.values():
        other = way(module, tmp_path)
        assert [layer.initialized for layer in lora_layers(other).values()] == [True, False]
    assert not second.initialized


@pytest.mark.parametrize("start", ["A zero", "B zero"])
def test_older_checkpoints_are_read_by_what_their_factors_are(start: str) -> None:
    module = started(STARTS[start])
    plain = {key: value.clone() for key, value in module.state_dict().items()}  # a plain dict has no metadata
    other = adapted()
    other.load_state_dict(plain, strict=True)
    check_kept(module, other)
    for described in (module, other := adapted()):
        AdapterCheckpoint.attach(described, CONFIG)
    state = dict(module.state_dict())
    state[KEY] = {key: value for key, value in state[KEY].items() if key != "uninitialized"}
    other.load_state_dict(state)
    check_kept(module, other)
    untold = adapted()
    untold.load_state_dict({key: value.clone() for key, value in adapted().state_dict().items()})
    assert initialize(untold) == 2


@pytest.mark.parametrize("start", list(STARTS))
def test_a_state_dict_without_an_adapters_factors_says_nothing_of_its_start(start: str) -> None:
    """Such as one of the base's weights alone, or of one of two layers."""
    module = started(STARTS[start])
    module.load_state_dict({"net.0.base_layer.bias": torch.ones(6)}, strict=False)
    check_kept(started(STARTS[start]), module)
    part = {key: value for key, value in adapted().state_dict().items() if key.startswith("net.1.")}
    module.load_state_dict(part, strict=False)
    assert [layer.initialized for layer in lora_layers(module).values()] == [True, False]


def test_state_dict_has_no_other_entries_than_before() -> None:
    layer = LoRALinear(nn.Linear(4, 4), r=2)
    factors = {"lora_A", "lora_B", "initial_A", "initial_B"}
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", *factors}


def test_loading_on_the_meta_device() -> None:
    with torch.device("meta"):
        empty = adapted()
    empty.load_state_dict(started(STARTS["both zero"]).state_dict(), assign=True)
    assert all(layer.initialized for layer in lora_layers(empty).values())
    with torch.device("meta"):
        other = adapted()
        other.load_state_dict(adapted().state_dict())
    assert not any(layer.initialized for layer in lora_layers(other).values())
