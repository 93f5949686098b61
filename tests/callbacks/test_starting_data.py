"""Starts from data in fit: which data, that training does not notice, what is kept, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model, tiny_model, write_examples
from helpers.starting import FROM_DATA
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchmetrics import MeanMetric

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule, lora_layers
from milora_lightning.callbacks import _starting_data
from milora_lightning.data import Files
from milora_lightning.statistics import kept

DATA = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of batches of the passes over data."""
    lengths: list[int] = []
    collect = _starting_data.in_groups

    def counted(layers: Any, needs: Any, over: Any, preserve: Any) -> Any:
        lengths.append(len(over.batches))
        return collect(layers, needs, over, preserve)

    monkeypatch.setattr(_starting_data, "in_groups", counted)
    return lengths


class Small(LightningModule):
    """A module like anybody's: it logs, keeps a metric, drops entries, and shuffles its data."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
        self.net[0].weight.data *= weight
        self.metric, self.seen = MeanMetric(), []
        self.generator = torch.Generator().manual_seed(5)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        loss = (self.net(x) - 1).square().mean()
        self.metric(loss)
        self.log("loss", loss)
        if self.training:
            self.seen.append((x.clone(), torch.get_rng_state()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def train_dataloader(self, data: Tensor = DATA) -> DataLoader[Any]:
        rows: Any = torch.utils.data.TensorDataset(data)
        return DataLoader(rows, batch_size=2, sampler=RandomSampler(rows, generator=self.generator))


def fitted(folder: Path, init: str = "eva", module: LightningModule | None = None, **options: Any) -> Any:
    module = Small() if module is None else module
    callback = MiLoRAInit(r=2, init=init, seed=0, **options)
    torch.manual_seed(3)
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[callback])
    trainer.fit(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


def starts(module: nn.Module) -> dict[str, Tensor]:
    layers = lora_layers(module)
    return {name: layer.lora_A if layer.initial_A is None else layer.initial_A for name, layer in layers.items()}


@pytest.mark.parametrize("init", ["eva", "lora_one"])
def test_training_does_not_notice(init: str, tmp_path: Path) -> None:
    """The same batches in the same order, the same random states, and a metric that counts training's batches only."""
    with_data, plain = fitted(tmp_path, init), fitted(tmp_path, "milora")
    assert len(with_data.seen) == len(plain.seen) == 6
    for (x, state), (expected, other) in zip(with_data.seen, plain.seen, strict=True):
        assert torch.equal(x, expected)
        assert torch.equal(state, other)
    assert with_data.metric._update_count == plain.metric._update_count
    assert "log" not in vars(with_data)
    assert with_data.net.training


def test_statistics_are_kept_by_data_and_weights(tmp_path: Path, passes: list[int], cache: Path) -> None:
    first, again = fitted(tmp_path), fitted(tmp_path)
    assert passes == [6]
    assert all(torch.equal(x, y) for x, y in zip(starts(first).values(), starts(again).values(), strict=True))
    fitted(tmp_path, "corda")  # takes the same statistics
    assert len(passes) == 1
    other = Small()
    other.train_dataloader = lambda: Small.train_dataloader(other, DATA + 1)  # type: ignore[method-assign]
    fitted(tmp_path, module=other)
    assert len(passes) == 2
    fitted(tmp_path, module=Small(weight=1.5))
    assert len(passes) == 3
    fitted(tmp_path, statistics_batches=2)
    assert passes[-2:] == [6, 2]
    fitted(tmp_path, cache=False)
    assert len(passes) == 5
    assert len(list((cache / "statistics").iterdir())) == 4


def test_damaged_and_large_statistics(
    tmp_path: Path, passes: list[int], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted(tmp_path)
    (file,) = (cache / "statistics").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="unusable, and collected anew"):
        fitted(tmp_path)
    assert len(passes) == 2
    monkeypatch.setattr(kept, "LARGEST", 10)
    fitted(tmp_path, module=Small(weight=2.0))
    assert len(list((cache / "statistics").iterdir())) == 1


@pytest.mark.parametrize("when", ["from the first", "while writing"])
def test_what_cannot_be_kept_is_used_all_the_same(
    when: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = starts(fitted(tmp_path, cache=False))
    if when == "from the first":
        cache.write_text("")  # a file where the folder should be
    else:
        monkeypatch.setattr(kept, "save_file", Mock(side_effect=OSError("no space left")))
    with pytest.warns(UserWarning, match="Statistics cannot be kept"):
        found = starts(fitted(tmp_path))
    assert all(torch.equal(each, expected[name]) for name, each in found.items())
    assert not list(cache.glob("statistics/*"))


def test_a_failure_while_data_are_run_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    class Failing(Small):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise OSError("a file of the user's")

    with pytest.raises(OSError, match="of the user's"):
        fitted(tmp_path, module=Failing())
    assert not list(cache.glob("statistics/*"))


def test_an_entry_that_lost_files_is_collected_anew(tmp_path: Path, passes: list[int], cache: Path) -> None:
    expected = starts(fitted(tmp_path))
    (file,) = (cache / "statistics").rglob("*.safetensors")
    file.unlink()
    with pytest.warns(UserWarning, match=r"unusable, and collected anew \(there are none of layer 'net.0'"):
        found = starts(fitted(tmp_path))
    assert all(torch.equal(each, expected[name]) for name, each in found.items())
    assert len(passes) == 2


def test_a_resumed_run_takes_nothing_from_data(tmp_path: Path, passes: list[int]) -> None:
    whole = fitted(tmp_path, cache=False)
    resumed = Small()
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[MiLoRAInit(r=2, init="eva", cache=False)])
    trainer.fit(resumed, ckpt_path=tmp_path / "last.ckpt")
    assert passes == [6]
    assert len(resumed.seen) == 6
    assert not torch.equal(resumed.net[0].lora_A, whole.net[0].lora_A)


class Adversarial(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Once(Small):
    def train_dataloader(self) -> Iterator[Any]:  # type: ignore[override]
        return iter([[DATA]])


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"init": "milora", "statistics_batches": 4}, Small, "for starts that depend on data, and init='milora' does"),
        ({"init": "eva", "preserve": "text.txt"}, Small, "init='eva' takes no notice"),
        ({"init": "sc_lora"}, Small, r"name such text.*\(preserve\)"),
        ({"init": "corda"}, Adversarial, "steps optimizers itself: give the module a method start_loss"),
        ({"init": "corda"}, Once, "read only once"),
    ],
)
def test_what_cannot_work_is_refused(options: Any, module: type[Small], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, module=module(), **options)


def test_sharded_weights_of_fsdp1_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _starting_data.StartingData(None, None, True)
    trainer = quiet_trainer(Path())
    monkeypatch.setattr(type(trainer), "strategy", FSDPStrategy())
    module = Small()
    callback = MiLoRAInit(r=2, init="corda")
    with pytest.raises(ValueError, match=r"init='corda' runs training data.*FSDPStrategy.*milora_fsdp2"):
        data.check(trainer, module, callback.config)
    with pytest.raises(ValueError, match="at least 1"):
        MiLoRAInit(init="eva", statistics_batches=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_tiny_model(folder / "model", "llama")
    write_examples(folder / "train.jsonl", 16)
    (folder / "text.txt").write_text("What is 1 plus 2? " * 300)
    return folder


def language_model(files: Path, folder: Path, init: str, **options: Any) -> tuple[nn.Module, list[Tensor]]:
    """Fit for two steps; the model and what it was trained on."""
    lm = CausalLMModule(str(files / "model"), "float32", max_new_tokens=2)
    data = SFTDataModule(
        Files(train=str(files / "train.jsonl"), validation_size=0), str(files / "model"), max_length=64, batch_size=4
    )
    seen: list[Tensor] = []
    step = lm.training_step
    lm.training_step = lambda batch, batch_idx: (seen.append(batch["input_ids"]), step(batch, batch_idx))[1]  # type: ignore[method-assign,assignment]
    quiet_trainer(folder, max_steps=2, callbacks=[MiLoRAInit(r=2, init=init, **options)]).fit(lm, datamodule=data)
    return lm, seen


def test_language_models_start_from_their_data_in_the_same_order(files: Path, tmp_path: Path) -> None:
    _, plain = language_model(files, tmp_path, "milora")
    for init, options in (("lora_ga", {}), ("sc_lora", {"preserve": str(files / "text.txt")})):
        lm, seen = language_model(files, tmp_path, init, statistics_batches=2, **options)
        assert all(torch.equal(x, y) for x, y in zip(seen, plain, strict=True))
        assert all(start.any() for start in starts(lm).values())


def test_what_is_to_be_preserved_takes_the_place_of_training_data(
    files: Path, tmp_path: Path, passes: list[int]
) -> None:
    from_data, _ = language_model(files, tmp_path, "lora_null")
    from_text, _ = language_model(files, tmp_path, "lora_null", preserve=str(files / "text.txt"))
    assert passes == [4, 1]
    assert (starts(from_data)["model.model.layers.0.mlp.down_proj"]
            - starts(from_text)["model.model.layers.0.mlp.down_proj"]).norm() > 0.01  # fmt: skip


def test_the_list_of_starts_from_data_is_complete() -> None:
    from milora_lightning.starts import registry

    assert {start.name for start in registry._METHODS if start.needs} == set(FROM_DATA) - {"sc_lora 0.8"}


class Unusual(Small):
    """Steps whose index has another name, an activation in place, a count of steps that begins to read, workers."""

    def __init__(self, slope: float = 0.0, workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net[1] = nn.LeakyReLU(slope, inplace=True)
        self.loader = DataLoader(
            DATA,
            batch_size=2,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=self.generator,
        )

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return super().training_step([batch], 0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches == 6
        return super().configure_optimizers()

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_loader_that_training_has_begun_to_read_loses_nothing(init: str, tmp_path: Path) -> None:
    for workers in (0, 1) if init == "corda" else (0,):
        with_data = fitted(tmp_path, init, Unusual(workers=workers))
        plain = fitted(tmp_path, "milora", Unusual(workers=workers))
        assert len(with_data.seen) == 6
        for (x, _), (expected, _) in zip(with_data.seen, plain.seen, strict=True):
            assert torch.equal(x, expected)


def test_statistics_of_other_settings_are_not_taken(tmp_path: Path, passes: list[int]) -> None:
    for slope in (0.0, 0.5, 0.0):
        fitted(tmp_path, module=Unusual(slope))
    assert len(passes) == 2


def test_batches_of_unknown_objects_are_not_told_apart_by_a_guess() -> None:
    class Graph:
        def __init__(self) -> None:
            self.x = torch.randn(3)

        def __repr__(self) -> str:
            return "Graph(x=[3])"

    assert kept.key_of([Graph()]) is None
    long = torch.zeros(2000)
    other = long.index_fill(0, torch.tensor([1000]), 1.0)
    assert kept.key_of([long.numpy()]) != kept.key_of([other.numpy()])


def test_models_of_another_configuration_compute_otherwise() -> None:
    model = tiny_model("llama")
    other = copy.deepcopy(model)
    assert kept.computes_with(model) == kept.computes_with(other)
    other.config.final_logit_softcapping = 30.0
    assert kept.computes_with(model) != kept.computes_with(other)
