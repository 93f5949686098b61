"""What evaluations report, of a module whose losses are known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer
from torch import Tensor, nn

from milora_lightning import CausalLMModule
from milora_lightning.metrics import AnswerAccuracy, TaskAccuracy, right_answer
from milora_lightning.training import evaluation
from milora_lightning.training.evaluation import EvaluatedModule
from milora_lightning.training.schedules import _steps, make_schedule, set_rate


class Known(EvaluatedModule):
    """A module whose batches say what their losses and answers are."""

    def __init__(self) -> None:
        super().__init__(lambda p: torch.optim.SGD(p, lr=1.0), "constant", 0, None, None, AnswerAccuracy())
        self.logged: dict[str, float] = {}
        self.followed: list[float] = []
        self.watched = SimpleNamespace(state=SimpleNamespace(fn="validate"), sanity_checking=False)

    @property
    def trainer(self) -> Any:
        return self.watched

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return torch.tensor(batch["total"]), torch.tensor(batch["tokens"])

    def answer(self, batch: dict[str, Any]) -> list[str]:
        return batch["answers"]

    def follow(self, loss: Tensor) -> None:
        self.followed.append(loss.item())

    def log_dict(self, values: dict[str, Any], **_: Any) -> None:  # type: ignore[override]
        self.logged |= {name: float(value) for name, value in values.items()}

    def evaluate(self, *batches: dict[str, Any]) -> dict[str, float]:
        self.logged = {}
        self.on_validation_epoch_start()
        for number, batch in enumerate(batches):
            self.validation_step(batch, number)
        self.on_validation_epoch_end()
        return self.logged


def of(total: float, tokens: int) -> dict[str, Any]:
    return {"total": total, "tokens": tokens}


def answered(*answers: str) -> dict[str, Any]:
    texts = {"prompt": [""] * len(answers), "instruction": [""] * len(answers), "task": [""] * len(answers)}
    return {**texts, "answers": list(answers), "reference": ["The answer is: 1"] * len(answers)}


def test_every_token_counts_the_same_in_batches_of_any_size() -> None:
    """Not every batch: their means, 10, 1 and 0, have another mean."""
    found = Known().evaluate(of(10.0, 1), of(9.0, 9), of(0.0, 0))
    assert found["val_loss"] == pytest.approx(19 / 10)
    assert found["val_perplexity"] == pytest.approx(torch.tensor(1.9).exp().item())
    assert "val_accuracy" not in found  # nothing was answered


def test_a_loss_that_is_not_finite_is_not_left_out() -> None:
    """Else a model that answers nothing but NaN to its longest examples would have the best loss of all."""
    assert math.isnan(Known().evaluate(of(math.nan, 5), of(9.0, 9))["val_loss"])
    assert Known().evaluate(of(math.inf, 5), of(9.0, 9))["val_loss"] == math.inf


def test_each_evaluation_begins_anew() -> None:
    lm = Known()
    assert lm.evaluate(of(10.0, 2), answered("The answer is: 1", "2"))["val_accuracy"] == 0.5
    assert lm.evaluate(of(3.0, 1), answered("The answer is: 1")) == pytest.approx(
        {"val_loss": 3.0, "val_perplexity": torch.tensor(3.0).exp().item(), "val_accuracy": 1.0}
    )
    assert "val_accuracy" not in lm.evaluate(of(3.0, 1))


def test_schedules_follow_the_validations_of_training_alone() -> None:
    lm = Known()
    for fn, sanity in (("validate", False), ("fit", True), ("fit", False)):
        lm.watched = SimpleNamespace(state=SimpleNamespace(fn=evaluation.TrainerFn(fn)), sanity_checking=sanity)
        lm.evaluate(of(2.0, 1))
    assert lm.followed == [2.0]


def test_a_rate_that_is_set_in_the_middle_keeps_to_its_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule("linear", optimizer, 0, {}, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    set_rate(optimizer, schedule, 4.0)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["initial_lr"]) == (2.0, 4.0)
    optimizer.step()
    schedule.step()
    assert group["lr"] == pytest.approx(4.0 * 4 / 10)


@pytest.mark.parametrize(("given", "steps"), [(0, 0), (1, 1), (1.0, 1), (0.5, 50), (0.004, 0), (0.006, 1), (200, 200)])
def test_warm_up_below_one_is_a_share_of_the_run(given: float, steps: int) -> None:
    assert _steps(given, 100) == steps


@pytest.mark.parametrize(("algorithm", "clipped"), [(None, [0.3, -0.4]), ("norm", [0.3, -0.4]), ("value", [0.5, -0.5])])
def test_gradients_are_clipped_as_asked(algorithm: str | None, clipped: list[float], tmp_path: Path) -> None:
    lm = CausalLMModule("unused")
    lm.trainer = quiet_trainer(tmp_path)
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, -4.0])
    lm.configure_gradient_clipping(torch.optim.SGD([weight], lr=1.0), 0.5, algorithm)
    torch.testing.assert_close(weight.grad, torch.tensor(clipped), rtol=1e-5, atol=1e-5)


def test_examples_that_only_fill_a_batch_do_not_count() -> None:
    batch = answered("The answer is: 1", "The answer is: 1", "The answer is: 2")
    batch["reference"][2] = None
    module = Known()
    assert module.evaluate(batch)["val_accuracy"] == 1
    assert len(module.predict_step(batch, 0)) == 2


def test_answers_to_several_tasks_are_counted_by_task() -> None:
    batch = answered("The answer is: 1", "The answer is: 2", "The answer is: 1")
    batch["task"] = ["first", "second", "second"]
    module = Known()
    module.metric = TaskAccuracy(dict.fromkeys(["first", "second"], right_answer))
    logged = module.evaluate(batch)
    assert (logged["val_accuracy/first"], logged["val_accuracy/second"], logged["val_accuracy"]) == (1, 0.5, 0.75)


def test_an_evaluation_that_answers_nothing_has_no_accuracy() -> None:
    module = Known()
    module.evaluate(answered("The answer is: 1"))
    logged = module.evaluate(of(6.0, 3))
    assert "val_accuracy" not in logged
    assert logged["val_perplexity"] == pytest.approx(math.exp(2))


@pytest.mark.parametrize("stage", ["val", "test"])
def test_results_have_the_name_of_their_stage(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = CausalLMModule("embedded")
    logged: dict[str, Any] = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn="testing"))
    module.eval_loss.update(torch.tensor(6.0), torch.tensor(3))
    {"val": module.on_validation_epoch_end, "test": module.on_test_epoch_end}[stage]()
    assert {name: value.item() for name, value in logged.items()} == {
        f"{stage}_loss": 2,
        f"{stage}_perplexity": pytest.approx(math.exp(2)),
    }
