"""An optimizer step has the same examples on any number of devices, however they are shared out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_fixtures import InMemory, make_tokenizer, rows
from helpers.models import quiet_trainer, save_tiny_model
from helpers.modules import data, module
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from milora_lightning import MiLoRAInit
from milora_lightning.data import SFTDataModule
from milora_lightning.data.batches.step_batch import StepBatch, continue_with, share_out
from milora_lightning.utils.errors import InvalidInputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
SIZE, GLOBAL = 23, 8
Step = list[tuple[int, ...]]


class Streamed(InMemory):
    """The same rows, one after the other."""

    def load(self, split: str) -> Any:
        found = super().load(split)
        return None if found is None else found.to_iterable_dataset()


class Share(SFTDataModule):
    """The data of one of several ranks, all of which one process plays in turn."""

    def __init__(self, ranks: int = 1, rank: int = 0, **options: Any) -> None:
        source = (Streamed if options.get("streaming") else InMemory)(train=rows(SIZE))
        super().__init__(source, make_tokenizer(), template="plain", **options)
        self.share = {"num_replicas": ranks, "rank": rank}

    def _rank(self) -> dict[str, int]:
        return self.share

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(2))


class Recorder(LightningModule):
    """Notes the examples of each optimizer step, and after how many of them it is validated."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps: list[Step] = []
        self.validated: list[int] = []
        self._examples: Step = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        self._examples += [tuple(ids[mask > 0].tolist()) for ids, mask in pairs]
        return self.weight.sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps.append(sorted(self._examples))
        self._examples = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_start(self) -> None:
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder: Path, ranks: int, batch_size: int | None, *callbacks: Callback, **options: Any) -> list[Recorder]:
    """Train each rank's share in turn."""
    examples = options.pop("examples", GLOBAL)
    streaming, ckpt = options.pop("streaming", False), options.pop("ckpt", None)
    more = {"streaming": True, "shuffle_buffer": 12, "num_workers": options.pop("workers", 0)} if streaming else {}
    recorders = []
    for rank in range(ranks):
        recorder = Recorder()
        mine = list(callbacks) if rank == 0 else []
        settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": bool(mine), **options}
        trainer = quiet_trainer(folder, callbacks=mine, **settings)
        share = Share(ranks, rank, batch_size=batch_size, global_batch_size=examples, **more)
        trainer.fit(recorder, share, ckpt_path=ckpt, weights_only=True if ckpt else None)
        recorders.append(recorder)
    return recorders


def steps(recorders: list[Recorder]) -> list[Step]:
    """The examples of each step on all ranks."""
    assert len({len(r.steps) for r in recorders}) == 1
    return [
        sorted(example for part in parts for example in part)
        for parts in zip(*(r.steps for r in recorders), strict=True)
    ]


def test_examples_are_shared_out_exactly() -> None:
    draw = random.Random(0)
    for _ in range(300):
        devices, most = draw.randint(1, 9), draw.randint(1, 20)
        total = draw.randint(1, 200)
        if total % devices:
            with pytest.raises(InvalidInputError, match=f"cannot be shared evenly by {devices} devices"):
                share_out(total, most, devices)
            continue
        step = share_out(total, most, devices)
        assert step.total == total
        assert step.examples <= most
        fewer = [k for k in range(1, step.accumulated) if (total // devices) % k == 0 and total // devices // k <= most]
        assert fewer == []  # no fewer batches would do


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (1, 1), (2, 8), (2, 2), (4, 1), (8, None), (1, 3)])
def test_steps_have_the_same_examples(ranks: int, batch_size: int | None, tmp_path: Path) -> None:
    whole = steps(fit(tmp_path, 1, None))
    assert [len(step) for step in whole] == 2 * [8, 8, 7]  # of each epoch's 23
    shared = steps(fit(tmp_path, ranks, batch_size))
    assert len(shared) == len(whole)
    assert [step for i, step in enumerate(shared) if i % 3 < 2] == [s for i, s in enumerate(whole) if i % 3 < 2]
    for ours, last in zip(shared[2::3], whole[2::3], strict=True):  # what is left: some come twice on several ranks
        assert set(last) <= set(ours)
        assert len(ours) - len(last) < ranks


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 2), (2, 4), (4, 1)])
def test_steps_of_a_stream_have_the_same_examples(ranks: int, batch_size: int, workers: int, tmp_path: Path) -> None:
    options = {"streaming": True, "max_steps": 5, "max_epochs": -1, "workers": workers, "limit_val_batches": 0}
    assert steps(fit(tmp_path, ranks, batch_size, **options)) == steps(fit(tmp_path, 1, None, **options))


@pytest.mark.parametrize("interval", [2, 0.5, 1.0, 3])
@pytest.mark.parametrize("batch_size", [2, 1])
def test_intervals_and_limits_count_steps(interval: Any, batch_size: int, tmp_path: Path) -> None:
    """As of one device that takes the whole step at once."""
    for options in ({}, {"limit_train_batches": 2}, {"limit_train_batches": 0.7}, {"max_steps": 4}):
        if options.get("limit_train_batches") and isinstance(interval, int) and interval > 2:
            continue
        (whole,) = fit(tmp_path, 1, None, val_check_interval=interval, **options)
        (parts,) = fit(tmp_path, 1, batch_size, val_check_interval=interval, **options)
        assert parts.validated == whole.validated
        assert len(parts.steps) == len(whole.steps)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("before", [(1, None), (1, 2), (2, 1)])
@pytest.mark.parametrize("after", [(1, None), (1, 4), (4, 1)])
def test_a_run_goes_on_with_the_same_steps_elsewhere(
    before: tuple[int, Any], after: tuple[int, Any], streaming: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"limit_val_batches": 0}
    options |= {"streaming": True, "max_steps": 6, "max_epochs": -1} if streaming else {}
    whole = steps(fit(tmp_path, 1, None, **options))
    for step in (1, 2, 4):
        save = ModelCheckpoint(
            tmp_path, f"{step}", every_n_train_steps=step, save_top_k=1, save_on_train_epoch_end=False
        )
        fit(tmp_path, *before, save, **{**options, "max_steps": step})
        rest = steps(fit(tmp_path, *after, ckpt=save.best_model_path, **options))
        assert len(rest) == len(whole) - step
        for ours, theirs in zip(rest, whole[step:], strict=True):
            assert set(theirs) <= set(ours)
            assert len(ours) - len(theirs) < after[0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("examples", "batch_size", "left", "next_epoch"),
    [
        (6, 2, [6, 6, 3], [6, 6, 6, 5]),
        (12, 4, [12, 3], [12, 11]),
        (16, 4, [15], [16, 7]),
        (10, 5, [10, 5], [10, 10, 3]),
        (4, 2, [4, 4, 4, 3], [4, 4, 4, 4, 4, 3]),
    ],
)
def test_a_run_goes_on_with_whole_steps_of_another_size(
    examples: int, batch_size: int, left: list[int], next_epoch: list[int], streaming: bool, tmp_path: Path
) -> None:
    """The first step of what is left of an epoch is as large as any other."""
    options: dict[str, Any] = {"limit_val_batches": 0}
    options |= {"streaming": True, "max_epochs": -1} if streaming else {}
    save = ModelCheckpoint(tmp_path, "a", every_n_train_steps=1, save_top_k=1, save_on_train_epoch_end=False)
    before = steps(fit(tmp_path, 1, 8, save, **options, max_steps=1))
    options |= {"max_steps": 5} if streaming else {}
    with pytest.warns(UserWarning, match="trained with 8 examples a step"):
        rest = steps(fit(tmp_path, 1, batch_size, ckpt=save.best_model_path, examples=examples, **options))
    assert [len(step) for step in rest] == (4 * [examples] if streaming else left + next_epoch)
    if not streaming:
        assert len({e for step in [*before, *rest[: len(left)]] for e in step}) == SIZE


class SavesAt(Callback):
    """Saves a checkpoint after some number of batches, as ``train_time_interval`` and validations do."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.left = path, batches

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:`weights_only` was not set")
@pytest.mark.parametrize("batches", [2, 3, 6, 11, 12, 14])
@pytest.mark.parametrize("after", [(1, 2), (1, None), (2, 1)])
def test_a_step_that_was_half_accumulated_is_done_again(batches: int, after: tuple[int, Any], tmp_path: Path) -> None:
    """Checkpoints hold no gradients."""
    whole = steps(fit(tmp_path, 1, 2, limit_val_batches=0))
    fit(tmp_path, 1, 2, SavesAt(tmp_path / "a.ckpt", batches), limit_val_batches=0, enable_checkpointing=False)
    rest = steps(fit(tmp_path, *after, ckpt=tmp_path / "a.ckpt", limit_val_batches=0))
    assert len(rest) > 0
    for ours, theirs in zip(rest, whole[-len(rest) :], strict=True):
        assert set(theirs) <= set(ours)
    done = batches // 12 * 3 + batches % 12 // 4
    assert len(rest) == len(whole) - done


@pytest.mark.filterwarnings("ignore:`weights_only` was not set")
@pytest.mark.parametrize("batches", [2, 4, 7])
@pytest.mark.parametrize("batch_size", [2, None])
def test_a_half_accumulated_step_of_a_stream_is_done_again(
    batches: int, batch_size: int | None, tmp_path: Path
) -> None:
    options = {"streaming": True, "max_steps": 3, "max_epochs": -1, "limit_val_batches": 0}
    whole = steps(fit(tmp_path, 1, 2, SavesAt(tmp_path / "a", batches), enable_checkpointing=False, **options))
    assert steps(fit(tmp_path, 1, batch_size, ckpt=tmp_path / "a", **options)) == whole[batches // 4 :]


@pytest.mark.filterwarnings("ignore:The checkpoint was trained with")
@pytest.mark.parametrize("now", [StepBatch(1, 2, 4), StepBatch(2, 4, 1), StepBatch(1, 4, 2), StepBatch(4, 3, 2)])
def test_a_stream_has_had_the_batches_of_the_steps_that_were_done(now: StepBatch) -> None:
    """Three steps of two batches of four, and half of a fourth, which is done again."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    counts = {"ready": 8, "started": 8, "processed": 7, "completed": 6}
    progress = {"total": dict(counts), "current": dict(counts)}
    loops = {"fit_loop": {"epoch_loop.batch_progress": progress}}
    trainer._checkpoint_connector._loaded_checkpoint = {"loops": loops}
    continue_with(trainer, {"examples": 8, "batch": 4, "undone": 1}, now, streaming=True)
    done = 3 * now.accumulated
    wanted = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done - 1}
    assert progress == {"total": wanted, "current": wanted}


def test_the_next_run_of_a_trainer_counts_from_the_start(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "a", every_n_train_steps=1, save_top_k=1, save_on_train_epoch_end=False)
    fit(tmp_path, 1, 8, save, max_steps=1)
    trainer = quiet_trainer(tmp_path, max_steps=2, max_epochs=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match="trained with 8 examples a step"):
        trainer.fit(
            Recorder(), Share(batch_size=2, global_batch_size=6), ckpt_path=save.best_model_path, weights_only=True
        )
    assert [batch for batch in range(1, 7) if batch % trainer.accumulate_grad_batches == 0] == [3, 6]


def test_the_next_data_of_a_trainer_find_what_it_was_asked_for(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0, limit_train_batches=2)
    for options, wanted in (
        ({"batch_size": 2, "global_batch_size": 8}, [8, 8]),
        ({"batch_size": 4, "global_batch_size": 8}, [8, 8]),
        ({"batch_size": 2, "global_batch_size": 8}, [8, 8]),
        ({"batch_size": 4}, [4, 4]),
    ):
        recorder = Recorder()
        trainer.fit(recorder, Share(**options))
        assert [len(step) for step in recorder.steps] == wanted
        trainer.fit_loop.max_epochs += 1
    assert (trainer.accumulate_grad_batches, trainer.limit_train_batches) == (1, 2)


def test_less_than_a_step(tmp_path: Path) -> None:
    """An interval is one step at least, as of a whole step at once; no step at all is refused."""
    for batch_size in (None, 2):
        (recorder,) = fit(tmp_path, 1, batch_size, val_check_interval=0.1)
        assert recorder.validated == [1, 2, 3, 4, 5, 6]
        with pytest.raises(InvalidInputError, match=r"limit_train_batches=0.1 is less than one of the 3 optimizer"):
            fit(tmp_path, 1, batch_size, limit_train_batches=0.1)


def test_batches_that_nobody_accumulates_are_told() -> None:
    share = Share(batch_size=2, global_batch_size=8)
    share.setup("fit")
    with pytest.warns(UserWarning, match="accumulate 4 batches"):
        share.train_dataloader()


def test_a_step_in_parts_learns_what_it_learns_at_once(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "llama", "llama")
    found = []
    for batch_size in (4, 2, 1):
        lm = module(base)
        trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4, cache=False)], max_steps=4, limit_val_batches=0)
        trainer.fit(lm, data(tmp_path, base, batch_size=batch_size, global_batch_size=4))
        assert trainer.accumulate_grad_batches == 4 // batch_size
        found.append({n: p.detach() for n, p in lm.named_parameters() if p.requires_grad})
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="batch_size=16 is more than global_batch_size=8"):
        Share(batch_size=16, global_batch_size=8)
    with pytest.raises(InvalidInputError, match="global_batch_size must be at least 1"):
        Share(global_batch_size=0)
    with pytest.raises(InvalidInputError, match="cannot be shared evenly by 3 devices: use 2 devices"):
        fit(tmp_path, 3, 1)
    with pytest.raises(
        InvalidInputError, match=r"accumulate_grad_batches=3 does not fit data.global_batch_size: 8 exam"
    ):
        fit(tmp_path, 1, 4, accumulate_grad_batches=3)
    with pytest.raises(InvalidInputError, match="GradientAccumulationScheduler changes"):
        fit(tmp_path, 1, 4, GradientAccumulationScheduler({0: 2}), enable_checkpointing=False)
    manual = Recorder()
    manual.automatic_optimization = False
    with pytest.raises(InvalidInputError, match="Recorder optimizes manually"):
        quiet_trainer(tmp_path).fit(manual, Share(batch_size=2, global_batch_size=8))


def test_without_it_batches_are_what_they_were(tmp_path: Path) -> None:
    """Each device's own, accumulated as often as the Trainer is told, in the order of batches."""
    recorder = Recorder()
    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, limit_val_batches=0)
    share = Share(batch_size=4)
    trainer.fit(recorder, share)
    sampler = share.epoch().sampler
    assert [len(step) for step in recorder.steps] == [8, 8, 7]
    assert (sampler.group, sampler.global_batch) == (4, 4)
    assert trainer.accumulate_grad_batches == 2


def said_at_setup(capsys: pytest.CaptureFixture[str], ranks: int, **options: Any) -> str:
    share = Share(ranks, 0, **options)
    share.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    share.setup("fit")
    return capsys.readouterr().err


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr("milora_lightning.data.shared_steps.inform", said.append)
    return said


def test_a_step_is_described_where_several_things_make_it_up(
    capsys: pytest.CaptureFixture[str], heard: list[str]
) -> None:
    for options in ({"batch_size": 4, "global_batch_size": 64}, {"batch_size": 4}):
        said_at_setup(capsys, 8, **options)
    said_at_setup(capsys, 1, batch_size=4)
    said_at_setup(capsys, 1, global_batch_size=4)
    assert heard == [
        "64 examples a step = 8 devices x 4 examples x 2 accumulated batches.",
        "32 examples a step = 8 devices x 4 examples; with data.global_batch_size it is the same on any number of "
        "devices.",
    ]


def test_going_on_with_larger_steps_is_told(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "a", every_n_train_steps=1, save_top_k=1)
    fit(tmp_path, 1, 2, save, max_steps=1)
    trainer = quiet_trainer(tmp_path, max_steps=2)
    with pytest.warns(UserWarning, match="trained with 8 examples a step, and this run goes on with 4 examples a step"):
        trainer.fit(Recorder(), Share(batch_size=4), ckpt_path=save.best_model_path, weights_only=True)
