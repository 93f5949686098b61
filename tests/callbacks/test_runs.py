"""Whole runs of a few steps: what is trained, measured and said in each, by what the user passed."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.callback_modules import Regression
from helpers.models import quiet_trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from milora_lightning import (
    ChoiceMonitor,
    EvaluationSummary,
    LoRAConfig,
    MiLoRAInit,
    SubspaceMonitor,
    collect_statistics,
    initialize,
    inject,
    lora_layers,
)
from milora_lightning.callbacks import _starting_data
from milora_lightning.callbacks._starting_data import _training_batches

ROWS = torch.randn(64, 12, generator=torch.Generator().manual_seed(7))


class Rows(LightningDataModule):
    """Data that know better than their loader which batches stand for them."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(ROWS), batch_size=8)

    def sample_batches(self, number: int) -> list[Any]:
        return [[ROWS[8 * i : 8 * i + 8] * 2] for i in range(number)]


def test_a_start_takes_the_batches_that_a_data_module_samples() -> None:
    trainer: Any = SimpleNamespace(datamodule=Rows())
    for number in (1, 3):
        batches = _training_batches(trainer, number)
        assert len(batches) == number
        assert torch.equal(torch.cat([rows for (rows,) in batches]), 2 * ROWS[: 8 * number])


@pytest.mark.parametrize("room", [1, 10**9])
def test_each_layer_starts_from_its_own_statistics_in_however_many_groups(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from all statistics at once."""
    collect = _starting_data.in_groups
    monkeypatch.setattr(_starting_data, "in_groups", lambda *args: collect(*args, room=room))
    module = Regression()
    callback = MiLoRAInit(r=2, target_modules=["0", "3"], init="corda", statistics_batches=2, cache=False, seed=1)
    quiet_trainer(tmp_path, max_steps=1, callbacks=[callback]).fit(module, Rows())
    found = {name: layer.initial_A for name, layer in lora_layers(module).items()}
    assert len(found) == 2

    other = Regression()
    other.setup("fit")
    inject(other, LoRAConfig(r=2, target_modules=["0", "3"], init="corda"))
    for layer in lora_layers(other).values():
        layer.eval()
    statistics = collect_statistics(other, Rows().sample_batches(2), lambda batch: other(batch[0]))
    initialize(other, 1, cache=False, statistics=statistics)
    for name, layer in lora_layers(other).items():
        torch.testing.assert_close(found[name], layer.initial_A)


@pytest.mark.parametrize("init", ["milora", "full"])
def test_an_optimizer_made_before_the_adapters_is_refused_where_there_are_any(init: str, tmp_path: Path) -> None:
    class Early(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.setup("fit")
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.05)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[MiLoRAInit(r=2, target_modules=["0"], init=init)])
    if init == "full":
        trainer.fit(Early())
        return
    with pytest.raises(ValueError, match=r"^2 of 2 parameters .* are in no optimizer, such as 'net\.0\.lora_A'"):
        trainer.fit(Early())


def test_subspaces_are_logged_at_the_steps_that_are_measured_and_nowhere_else(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callbacks = [MiLoRAInit(r=2, target_modules=["0"]), SubspaceMonitor(every_n_steps=3, k=2)]
    options = {"logger": logger, "log_every_n_steps": 1, "max_steps": 8, "limit_val_batches": 0}
    quiet_trainer(tmp_path, callbacks=callbacks, **options).fit(Regression())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    names = [name for name in rows[0] if name.startswith("subspace/")]
    assert names
    steps = [int(row["step"]) for row in rows if row[names[0]]]
    assert steps == [2, 5]  # as Lightning numbers what it logs in the third and the sixth step


def test_results_after_training_stand_beside_those_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = EvaluationSummary()
    summary.before, summary.after = {"val_loss": 3.25}, {"val_loss": 1.5, "val_accuracy": 0.125}
    trainer: Any = SimpleNamespace(is_global_zero=True, num_val_batches=[1])
    summary.on_fit_end(trainer, torch.nn.Module())  # type: ignore[arg-type]
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["loss", "3.25", "1.5"] in rows
    assert ["accuracy", "-", "0.125"] in rows
    trainer.is_global_zero = False
    summary.on_fit_end(trainer, torch.nn.Module())  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "fits"),
    [({"batch_size": 1}, True), ({"number": 2}, True), ({"batch_size": 0}, False), ({"number": 1}, False)],
)
def test_questions_are_at_least_two_and_asked_at_least_one_at_a_time(
    options: dict[str, Any], fits: bool, tmp_path: Path
) -> None:
    (tmp_path / "sums.json").write_text("[]")
    if fits:
        ChoiceMonitor(str(tmp_path / "sums.json"), **options)
        return
    with pytest.raises(ValueError, match="must be at least 2 and 1"):
        ChoiceMonitor(str(tmp_path / "sums.json"), **options)
