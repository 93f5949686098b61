"""Schedules over runs of known and unknown length, learning rates that are found, and what a resumed run takes over."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model
from helpers.modules import data, module
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.tuner import Tuner
from transformers import SchedulerType, get_scheduler

from milora_lightning import MiLoRAInit, RandomState
from milora_lightning.training.schedules import check_length, check_schedule, follows_loss, make_schedule

NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 0.2},
}
NAMES = [kind.value for kind in SchedulerType]
ENDLESS = {"constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy"}


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("schedules") / "llama", "llama")


def fit(llama: Path, folder: Path, lm: dict[str, Any], **options: Any) -> tuple[Trainer, list[float]]:
    """Train one epoch of 10 batches unless told otherwise; return the Trainer and the rate of each batch."""
    rates = Rates()
    ckpt_path = options.pop("ckpt_path", None)
    callbacks = [MiLoRAInit(r=2, cache=False), RandomState(), *options.pop("callbacks", []), rates]
    trainer = quiet_trainer(folder, **{"max_epochs": 1, "callbacks": callbacks, **options})
    trainer.fit(module(llama, **lm), data(folder, llama, num_generation_examples=0), ckpt_path=ckpt_path)
    return trainer, rates.seen


def optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_of_transformers_trains(name: str, llama: Path, tmp_path: Path) -> None:
    options = {"lr_scheduler": name, "lr_scheduler_kwargs": NEEDED.get(name), "warmup_steps": 0.2}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no warm-up")
        _, rates = fit(llama, tmp_path, options)
    if name in ("reduce_lr_on_plateau", "greedy"):
        assert rates == [3e-4] * 10
        return
    ours = optimizer(3e-4)
    kwargs = {key: 2 if key == "num_decay_steps" else value for key, value in (NEEDED.get(name) or {}).items()}
    theirs = get_scheduler(name, ours, 2, 10, kwargs)
    expected = []
    for _ in range(10):
        expected.append(ours.param_groups[0]["lr"])
        ours.step()
        theirs.step()
    assert rates == pytest.approx(expected)
    assert max(rates) > 2.5e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_that_needs_a_length_is_refused_without_one(name: str) -> None:
    arguments = {**NEEDED.get(name, {}), **({"num_decay_steps": 5} if name == "warmup_stable_decay" else {})}
    if name in ENDLESS:
        make_schedule(name, optimizer(), 0 if name == "constant" else 3, arguments, math.inf)
    else:
        with pytest.raises(ValueError, match=rf"'{name}' needs to know how many steps.*max_steps"):
            check_length(name, 3, arguments, math.inf)
    check_length("warmup_stable_decay", 3, {"num_decay_steps": 5, "num_stable_steps": 9}, math.inf)
    with pytest.raises(ValueError, match="is a fraction of the run"):
        check_length("inverse_sqrt", 0.03, {}, math.inf)


def test_a_run_without_end_trains_or_is_refused_before_its_model_is_loaded(llama: Path, tmp_path: Path) -> None:
    class Ended(Callback):
        """Ends the run after three steps, as a user or the time would: how far a busy machine comes is not known."""

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    how = {"lr_scheduler": "constant_with_warmup", "warmup_steps": 2}
    _, rates = fit(llama, tmp_path, how, callbacks=[Ended()], max_epochs=-1)
    assert rates == pytest.approx([0, 1.5e-4, 3e-4])
    lm = module(llama)
    with pytest.raises(ValueError, match="'linear' needs to know how many steps"):
        quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=2)], max_epochs=-1).fit(lm, data(tmp_path, llama))
    assert lm.model is None


def test_warm_up_is_a_share_of_the_run_or_said_to_be_longer(llama: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*warm-up")
        _, rates = fit(llama, tmp_path, {"warmup_steps": 0.2})
        assert rates == pytest.approx([3e-4 * min(i / 2, (10 - i) / 8) for i in range(10)])
        _, rates = fit(llama, tmp_path, {"warmup_steps": 0.03}, max_steps=6)
        assert rates[0] == 3e-4
    with pytest.warns(match=r"6 steps and ends within its warm-up of 100: .* will only reach 1\.5e-05 of 0\.0003"):
        _, rates = fit(llama, tmp_path, {"warmup_steps": 100}, max_steps=6)
    assert max(rates) == pytest.approx(1.5e-5)
    with pytest.warns(match="warmup_steps=7 has no effect"):
        make_schedule("constant", optimizer(), 7, {}, 10)


def test_a_schedule_ends_with_the_run_though_accumulation_changes(llama: Path, tmp_path: Path) -> None:
    """Epochs of 10 batches: 5 steps, then 10; the sixteenth, which does not come, would have the rate zero."""
    accumulation = GradientAccumulationScheduler({0: 2, 1: 1})
    trainer, rates = fit(llama, tmp_path, {"warmup_steps": 0}, callbacks=[accumulation], max_epochs=2)
    assert trainer.global_step == 15
    assert rates[-1] == pytest.approx(3e-4 / 15)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0


def test_validation_beyond_the_epoch_is_counted_over_epochs_or_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is 15 batches, and an epoch has 10: set check_val_every_n_epoch: null"):
        fit(llama, tmp_path, {}, val_check_interval=15)
    validated: list[int] = []

    class Steps(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            validated.append(trainer.global_step)

    counted = {"val_check_interval": 15, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    fit(llama, tmp_path, {}, max_epochs=3, callbacks=[Steps()], **counted)
    assert validated == [15, 30]


def test_what_cannot_be_scheduled_is_refused_by_name(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"no lr_scheduler 'xyz'\. Known are: linear, cosine, "):  # like none there is
        check_schedule("xyz", 0, {})
    with pytest.raises(ValueError, match=r"'cosin'; did you mean 'cosine'.*warmup_stable_decay"):
        module(llama, lr_scheduler="cosin")
    with pytest.raises(ValueError, match=r"'polynomial' does not take min_lr: .* lr_end, power"):
        module(llama, lr_scheduler="polynomial", lr_scheduler_kwargs={"min_lr": 0})
    with pytest.raises(ValueError, match=r"'warmup_stable_decay' needs .*num_decay_steps"):
        module(llama, lr_scheduler="warmup_stable_decay")
    with pytest.raises(ValueError, match="warmup_steps must be"):
        module(llama, warmup_steps=1.5)
    with pytest.raises(ValueError, match=r"'cosine_with_min_lr'.*min_lr"):
        make_schedule("cosine_with_min_lr", optimizer(), 0, {}, 10)
    with pytest.raises(ValueError, match="a warm-up of 3 and a decay of 8 steps are more than the run's 10"):
        make_schedule("warmup_stable_decay", optimizer(), 3, {"num_decay_steps": 8}, 10)
    make_schedule("warmup_stable_decay", optimizer(), 2, {"num_decay_steps": 8}, 10)
    check_schedule("reduce_lr_on_plateau", 0, {"patience": 1, "factor": 0.5})


def test_a_plateau_is_of_validations(llama: Path, tmp_path: Path) -> None:
    """Five of them without progress and a patience of one: the rate is halved after the second and the fourth."""
    options = {
        "lr_scheduler": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 1, "factor": 0.5, "threshold": 1e9, "threshold_mode": "abs"},
        "warmup_steps": 0,
    }
    _, rates = fit(llama, tmp_path, options, val_check_interval=2)
    assert rates == pytest.approx([3e-4] * 6 + [1.5e-4] * 4)
    with pytest.raises(ValueError, match="follows val_loss, and there is no validation data"):
        fit(llama, tmp_path, options, limit_val_batches=0)


@pytest.mark.parametrize("as_callback", [True, False])
def test_a_learning_rate_that_is_found_is_the_highest_of_the_run(
    as_callback: bool, llama: Path, tmp_path: Path
) -> None:
    finding = {"min_lr": 1e-4, "max_lr": 0.5, "num_training_steps": 20, "early_stop_threshold": None}
    if as_callback:
        finder = LearningRateFinder(**finding)
        trainer, rates = fit(llama, tmp_path, {"warmup_steps": 2}, callbacks=[finder], max_epochs=3)
        found, lm = finder.optimal_lr.suggestion(), trainer.lightning_module
    else:
        finding["num_training"] = finding.pop("num_training_steps")
        lm, watched = module(llama, warmup_steps=2), Rates()
        trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[MiLoRAInit(r=2, cache=False), watched])
        datamodule = data(tmp_path, llama, num_generation_examples=0)
        found = Tuner(trainer).lr_find(lm, datamodule=datamodule, **finding).suggestion()
        watched.seen.clear()
        trainer.fit(lm, datamodule)
        rates = watched.seen
    assert lm.learning_rate == lm.hparams.learning_rate == found
    assert found != 3e-4
    assert rates == pytest.approx([found * min(i / 2, (30 - i) / 28) for i in range(30)])


def test_the_batch_size_finder_finds(llama: Path, tmp_path: Path) -> None:
    trainer, _ = fit(llama, tmp_path, {}, callbacks=[BatchSizeFinder(init_val=5, max_trials=2)])
    assert trainer.datamodule.batch_size == 10
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    "made",
    [
        lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
        lambda params: torch.optim.Adafactor(params, lr=1e-2),
        lambda params: torch.optim.LBFGS(params, lr=1e-2, max_iter=2),
        lambda params: torch.optim.RMSprop(params, lr=1e-3),
    ],
)
def test_optimizers_train(made: Any, llama: Path, tmp_path: Path) -> None:
    trainer, _ = fit(llama, tmp_path, {"optimizer": made}, max_steps=3)
    assert trainer.global_step == 3


@pytest.mark.parametrize("how", ["Trainer", "callback"])
def test_an_optimizer_of_several_losses_a_step_accumulates_no_gradients(how: str, llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    if how == "callback":
        options = {"callbacks": [GradientAccumulationScheduler({1: 2})]}
    with pytest.raises(ValueError, match="LBFGS computes the loss several times in a step"):
        fit(llama, tmp_path, {"optimizer": torch.optim.LBFGS}, max_epochs=2, **options)


def saved(llama: Path, folder: Path, lm: dict[str, Any], **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    saving = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=3, save_top_k=-1, **options)
    fit(llama, folder, lm, callbacks=[saving], max_steps=6, enable_checkpointing=True)
    return folder / "saved" / "step=3.ckpt"


def test_resuming_from_what_training_cannot_go_on_from_is_refused(llama: Path, tmp_path: Path) -> None:
    path = saved(llama, tmp_path, {})
    sgd = {"optimizer": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9)}
    with pytest.raises(ValueError, match=r"state of torch.optim.adamw.AdamW, and .* is torch.optim.sgd.SGD"):
        fit(llama, tmp_path, sgd, ckpt_path=path)
    with pytest.raises(ValueError, match="are of different kinds"):
        fit(llama, tmp_path, {"lr_scheduler": "reduce_lr_on_plateau", "warmup_steps": 0}, ckpt_path=path)
    older = torch.load(path, weights_only=True)
    del older["optimization"]
    torch.save(older, tmp_path / "older.ckpt")
    with pytest.raises(ValueError, match=r"state of another optimizer, and .* is torch.optim.sgd.SGD"):
        fit(llama, tmp_path, sgd, ckpt_path=tmp_path / "older.ckpt")
    assert fit(llama, tmp_path, {}, ckpt_path=tmp_path / "older.ckpt")[0].global_step == 10
    weights = saved(llama, tmp_path / "weights", {}, save_weights_only=True)
    with pytest.raises(ValueError, match="holds weights only"):
        fit(llama, tmp_path, {}, ckpt_path=weights)


def test_a_resumed_run_says_what_it_takes_over(llama: Path, tmp_path: Path) -> None:
    """Another schedule goes on from the step that was reached; the optimizer's options are the checkpoint's."""
    path = saved(llama, tmp_path, {"warmup_steps": 0})
    other = {
        "lr_scheduler": "cosine",
        "warmup_steps": 0,
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1.0, weight_decay=0.0),
    }
    with pytest.warns(match=r"as in the checkpoint, with lr=0.0003 \(not 1.0\)"):
        _, rates = fit(llama, tmp_path, other, ckpt_path=path)
    assert rates[1:] == pytest.approx([1.5e-4 * (1 + math.cos(math.pi * i / 10)) for i in range(4, 10)])
    _, rates = fit(llama, tmp_path, {"warmup_steps": 0, "learning_rate": 1e-2}, ckpt_path=path)
    assert rates == pytest.approx([1e-2 * (10 - i) / 10 for i in range(3, 10)])


def test_only_what_follows_the_loss_does() -> None:
    kinds = {name: follows_loss(make_schedule(name, optimizer(), 0, NEEDED.get(name, {}), 10)) for name in NAMES}
    known = {"reduce_lr_on_plateau", "greedy"} & set(NAMES)  # transformers 5.0 has no greedy
    assert {name for name, follows in kinds.items() if follows} == known
    assert "reduce_lr_on_plateau" in known
