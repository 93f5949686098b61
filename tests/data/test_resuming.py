"""A resumed run trains on each example as often as an uninterrupted one, however it was interrupted and goes on."""

from __future__ import annotations

import contextlib
import math
import random
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers.data_fixtures import InMemory, make_tokenizer, rows
from helpers.models import quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from milora_lightning.data import LengthGroupedSampler, SFTDataModule
from milora_lightning.data.batches.resuming import position
from milora_lightning.data.batches.sampling import Position, grouped_order

pytestmark = [
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def drawn(seed: int) -> tuple[random.Random, int, list[int]]:
    generator = random.Random(seed)
    size = generator.randint(1, 60)
    return generator, size, [generator.randint(1, 99) for _ in range(size)]


@pytest.mark.parametrize("seed", range(200))
def test_ranks_share_what_other_ranks_left(seed: int) -> None:
    """Whoever begins and whoever goes on, they train together on the epoch, repeating only to share out evenly."""
    generator, size, lengths = drawn(seed)
    old, new = ((generator.randint(1, 4), generator.randint(1, 5)) for _ in range(2))
    end = generator.choice([None, *range(1, size + 1)])
    batches = generator.randint(0, (end or size) // (old[0] * old[1]))
    consumed = batches * old[0] * old[1]

    def shares(ranks: int, batch_size: int, start: Position) -> list[list[int]]:
        samplers = [LengthGroupedSampler(lengths, batch_size, True, 9, ranks, rank) for rank in range(ranks)]
        return [list(sampler.share(start)) for sampler in samplers]

    begin = Position(epoch=2, seed=9, global_batch=old[0] * old[1])
    before = Counter(i for share in shares(*old, begin) for i in share[: batches * old[1]])
    start = Position(2, 9, begin.global_batch, consumed, end)
    rest = shares(*new, start)
    assert len({len(share) for share in rest}) == 1
    epoch = grouped_order(lengths, 9, 2, begin.global_batch, shuffle=True)
    wanted = Counter(epoch[:end].tolist())
    repeated = before + Counter(i for share in rest for i in share) - wanted
    assert not wanted - before - Counter(i for share in rest for i in share)
    left = start.remaining(size)
    assert repeated.total() == -left % new[0]
    assert set(repeated) <= set(epoch[: new[0] - 1].tolist())  # the first ones
    if old == new and end is None:  # nothing but the border has changed
        assert rest == [share[batches * old[1] :] for share in shares(*old, begin)]


@pytest.mark.parametrize("grouped", [True, False])
def test_an_epoch_goes_on_in_the_kind_of_order_that_it_began_in(grouped: bool) -> None:
    """Also where group_by_length is another one by now; older checkpoints do not name it, and were grouped."""
    lengths = random.Random(0).choices(range(10, 401), k=200)
    began = LengthGroupedSampler(lengths, 8, seed=3, group_by_length=grouped)
    goes_on = LengthGroupedSampler(lengths, 8, seed=3, group_by_length=not grouped)
    saved = {name: value for name, value in asdict(began.start()).items() if name != "group_by_length" or not grouped}
    start = replace(position(saved), consumed=16)
    assert list(goes_on.share(start)) == list(began)[16:]
    assert list(goes_on) != list(began)


SIZE = 23


class Share(SFTDataModule):
    """The data of one of several ranks, all of which one process plays in turn."""

    tokenized: datasets.Dataset | None = None

    def __init__(self, ranks: int = 1, rank: int = 0, validates: bool = False, **options: Any) -> None:
        super().__init__(InMemory(train=rows(SIZE)), make_tokenizer(), template="plain", **options)
        self.validates = validates
        self.share = {"num_replicas": ranks, "rank": rank}

    def _rank(self) -> dict[str, int]:
        return self.share

    def _tokenized(self, split: Any, unanswered: bool = False) -> datasets.Dataset | None:
        if split == "train" and Share.tokenized is None:
            Share.tokenized = super()._tokenized(split, unanswered)
        return Share.tokenized if split == "train" else None

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(2)) if self.validates else []


class Recorder(LightningModule):
    """Notes the lengths and the first answers' tokens of what it is trained on, which tell examples apart."""

    def __init__(self, fail_at: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.batches: list[tuple[int, list[tuple[int, ...]]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == self.fail_at:
            raise ConnectionError("a step that fails")
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        self.batches.append((self.current_epoch, [tuple(ids[mask > 0].tolist()) for ids, mask in rows]))
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        self.trainer.estimated_stepping_batches  # noqa: B018  has Lightning make the loader before it restores
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(
    folder: Path, data: SFTDataModule, *callbacks: Callback, module: Recorder | None = None, ckpt: Any = None, **o: Any
) -> list[tuple[int, list[tuple[int, ...]]]]:
    module = module or Recorder()
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, **o}
    options["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **options)
    with contextlib.suppress(ConnectionError):
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module.batches


def examples(batches: list[tuple[int, list[tuple[int, ...]]]]) -> Counter[tuple[int, ...]]:
    return Counter(example for _, batch in batches for example in batch)


WAYS: dict[str, dict[str, Any]] = {
    "end of an epoch": {"every_n_epochs": 1},
    "within an epoch": {"every_n_train_steps": 7},
    "last batch of an epoch": {"every_n_train_steps": 5},
}
TRAINERS: dict[str, dict[str, Any]] = {
    "all": {},
    "limit": {"limit_train_batches": 5},
    "fraction": {"limit_train_batches": 0.5},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
    "limit and reload": {"limit_train_batches": 5, "reload_dataloaders_every_n_epochs": 1},
    "steps": {"limit_train_batches": 5, "max_steps": 12, "max_epochs": None},
    "steps without validation": {"max_steps": 30, "limit_val_batches": 0},
    "accumulate": {"limit_train_batches": 5, "accumulate_grad_batches": 2},
    "overfit": {"overfit_batches": 3},
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("way", WAYS)
def test_resumed_run_sees_the_batches_of_the_uninterrupted_one(way: str, trainer: str, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, **WAYS[way])
    options = TRAINERS[trainer]
    whole = fit(tmp_path, Share(batch_size=2), saved, **options)
    accumulated = options.get("accumulate_grad_batches", 1)
    per_epoch = Counter(epoch for epoch, _ in whole)[0]
    for path in tmp_path.glob("*.ckpt"):
        resumed = fit(tmp_path, Share(batch_size=2), ckpt=path, **options)
        epochs, steps = divmod(torch.load(path, weights_only=True)["global_step"], -(-per_epoch // accumulated))
        done = epochs * per_epoch + steps * accumulated
        assert whole[done:] == resumed


def test_epochs_differ_so_that_going_on_elsewhere_would_show(tmp_path: Path) -> None:
    whole = fit(tmp_path, Share(batch_size=2), limit_train_batches=5)
    assert len({str(batch) for _, batch in whole}) > 12


PROLONGED = [{"max_steps": 12, "max_epochs": None}, {"max_epochs": 9, "max_steps": 12}, {"max_epochs": 2}]


@pytest.mark.parametrize("second", PROLONGED)
@pytest.mark.parametrize("end", [3, 8])
@pytest.mark.parametrize("way", ["on_train_epoch_end", "after fit"])
def test_run_that_ended_in_the_middle_of_an_epoch_can_be_prolonged(
    way: str, end: int, second: Any, tmp_path: Path
) -> None:
    """Lightning takes the end by ``max_steps`` for an epoch's end, but does not begin a new one."""

    class SaveAtEnd(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    class SaveAtEpochEnd(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    limit = {"limit_train_batches": 5}
    whole = fit(tmp_path, Share(batch_size=2), **second, **limit)
    callback = SaveAtEnd() if way == "after fit" else SaveAtEpochEnd()
    first = fit(tmp_path, Share(batch_size=2), callback, **{**second, "max_steps": end}, **limit)
    resumed = fit(tmp_path, Share(batch_size=2), ckpt=tmp_path / "last.ckpt", **second, **limit)
    assert [batch for _, batch in first + resumed] == [batch for _, batch in whole]


@pytest.mark.parametrize("val_check_interval", [2, 5, 0.5])
def test_checkpoints_of_validations_go_on_there(val_check_interval: Any, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, save_on_train_epoch_end=False)
    options = {"limit_train_batches": 5, "val_check_interval": val_check_interval}
    whole = fit(tmp_path, Share(batch_size=2, validates=True), saved, **options)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 3
    for path in paths:
        resumed = fit(tmp_path, Share(batch_size=2, validates=True), ckpt=path, **options)
        assert [b for _, b in whole[torch.load(path, weights_only=True)["global_step"] :]] == [b for _, b in resumed]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failed_step_is_trained_on_when_the_run_goes_on(num_workers: int, tmp_path: Path) -> None:
    data = {"batch_size": 2, "num_workers": num_workers}
    saved = ModelCheckpoint(tmp_path, "failed", save_on_exception=True, every_n_epochs=9)
    whole = fit(tmp_path, Share(**data), limit_train_batches=5)
    first = fit(tmp_path, Share(**data), saved, module=Recorder(fail_at=(1, 2)), limit_train_batches=5)
    (path,) = tmp_path.glob("*.ckpt")
    resumed = fit(tmp_path, Share(**data), ckpt=path, limit_train_batches=5)
    assert first + resumed == whole


def test_second_fit_of_the_same_data_begins_anew(tmp_path: Path) -> None:
    data = Share(batch_size=2)
    first = fit(tmp_path, data, ModelCheckpoint(tmp_path, "a", every_n_train_steps=3), max_steps=3)
    again = fit(tmp_path, data, max_steps=3)
    fit(tmp_path, data, ckpt=tmp_path / "a.ckpt", max_steps=5)
    assert first == again == fit(tmp_path, data, max_steps=3)


@pytest.mark.parametrize("seed", range(16))
def test_other_ranks_go_on_in_the_middle_of_an_epoch(seed: int, tmp_path: Path) -> None:
    """The epoch in progress holds the examples that it was begun with, and the next one is as the new run has it."""
    generator = random.Random(seed)
    old, new = ((generator.randint(1, 4), generator.randint(1, 4)) for _ in range(2))
    old_length, new_length = (math.ceil(math.ceil(SIZE / ranks) / size) for ranks, size in (old, new))
    limits = [1.0, 0.6, generator.randint(1, min(old_length, new_length))]
    options: dict[str, Any] = {"limit_train_batches": generator.choice(limits), "max_epochs": 2}
    # In the first epoch, at its end, or in the second.
    step = generator.randint(1, 2 * int(min(old_length, options["limit_train_batches"])) or 1)
    if isinstance(options["limit_train_batches"], float):
        options["accumulate_grad_batches"] = generator.choice([1, 2])

    def runs(ranks: int, batch_size: int, saved: bool = False, **more: Any) -> list[list[tuple[int, Any]]]:
        shares = [Share(ranks, rank, batch_size=batch_size) for rank in range(ranks)]
        save = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=step, save_top_k=1, save_on_train_epoch_end=False)
        return [
            fit(tmp_path, share, *([save] if saved and i == 0 else []), **options, **more)
            for i, share in enumerate(shares)
        ]

    whole = [batch for rank in runs(*old) for batch in rank]
    first = runs(*old, saved=True, max_steps=step)
    path = tmp_path / "saved.ckpt"
    if not path.exists():
        pytest.skip("the run is shorter than that")
    resumed = runs(*new, ckpt=path)
    fresh = [batch for rank in runs(*new) for batch in rank]

    assert len({len(rank) for rank in resumed}) == 1
    after = [batch for rank in resumed for batch in rank]
    began = max(epoch for rank in first for epoch, _ in rank)
    seen = examples([b for rank in first for b in rank if b[0] == began] + [b for b in after if b[0] == began])
    wanted = examples([batch for batch in whole if batch[0] == began])
    assert set(seen) == set(wanted)
    # What comes twice is what is repeated to share out evenly, at most one example less than there are ranks.
    assert (seen - Counter(set(seen))).total() <= new[0] - 1 + old[0] - 1
    if began == 0:
        assert examples([b for b in after if b[0] == 1]) == examples([b for b in fresh if b[0] == 1])


def test_other_data_are_told(tmp_path: Path) -> None:
    fit(tmp_path, Share(batch_size=2), ModelCheckpoint(tmp_path, "a", every_n_train_steps=3), max_steps=3)
    data = SFTDataModule(InMemory(train=rows(30)), make_tokenizer(), template="plain", batch_size=2)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["SFTDataModule"] = checkpoint.pop("Share")
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="epoch 0 continues in another order, so some examples come twice"):
        fit(tmp_path, data, ckpt=tmp_path / "a.ckpt", max_epochs=1)


def test_checkpoints_that_count_batches_alone_go_on_as_before(tmp_path: Path) -> None:
    whole = fit(tmp_path, Share(batch_size=2), ModelCheckpoint(tmp_path, "a", every_n_train_steps=3, save_top_k=1))
    path = tmp_path / "a.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["Share"] = {"batches": 3, "description": "data"}
    torch.save(checkpoint, path)
    step = checkpoint["global_step"]
    assert [b for _, b in fit(tmp_path, Share(batch_size=2), ckpt=path)] == [b for _, b in whole[step:]]


def test_no_false_alarm_about_a_loader_that_cannot_go_on(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    fit(tmp_path, Share(batch_size=2), ModelCheckpoint(tmp_path, "a", every_n_train_steps=3), max_steps=3)
    fit(tmp_path, Share(batch_size=2), ckpt=tmp_path / "a.ckpt", max_epochs=1)
    assert not [w for w in recwarn if "not resumable" in str(w.message)]
