"""What a run of a comparison records: each example's own values, in the order of the data, once for each step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from milora_lightning import CausalLMModule, ChoiceMonitor
from milora_lightning.cli.comparing.measuring import MeasuredModule, Trajectory
from milora_lightning.metrics import AnswerAccuracy, TaskAccuracy, right_answer


def measured(**values: Any) -> MeasuredModule:
    module = MeasuredModule.__new__(MeasuredModule)
    vars(module).update({"losses": [], "scores": [], "_modules": {}, "_parameters": {}, "_buffers": {}, **values})
    return module


def trainer(step: int, *callbacks: Any, samplers: tuple[list[int], ...] = ([],), **metrics: float) -> Any:
    loaders = [SimpleNamespace(sampler=order) for order in samplers]
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    return SimpleNamespace(global_step=step, callbacks=callbacks, val_dataloaders=loaders, callback_metrics=values)


def test_examples_are_kept_in_the_order_of_the_data_with_their_weights() -> None:
    trajectory = Trajectory()
    for step, factor in ((0, 1.0), (5, 0.5)):
        batches = [([8.0, 3.0], [4, 1]), ([6.0], [2])]  # sums of losses and numbers of tokens of examples 2, 0 and 1
        losses = [(factor * torch.tensor(sums), torch.tensor(tokens)) for sums, tokens in batches]
        module = measured(losses=losses, scores=[1.0, 0.0])
        trajectory.on_validation_end(trainer(step, samplers=([2, 0, 1, 7], [1, 0])), module)
    loss, accuracy = trajectory.kept["val_loss"], trajectory.kept["val_accuracy"]
    assert loss.index.tolist() == [0, 1, 2]
    assert loss.weights.tolist() == [1, 2, 4]
    assert loss.values.tolist() == [[3, 3, 2], [1.5, 1.5, 1]]
    assert loss.means().tolist() == pytest.approx([17 / 7, 17 / 14])
    assert loss.steps.tolist() == [0, 5]
    assert (accuracy.index.tolist(), accuracy.values[0].tolist()) == ([0, 1], [0, 1])


def choices(every: str, **values: float) -> ChoiceMonitor:
    monitor = ChoiceMonitor("questions.json", every=every)  # type: ignore[arg-type]
    monitor.examples = {"forgetting_choice_loss": torch.tensor([values["loss"]])}
    monitor.results = {"forgetting_choice_loss": values["loss"]}
    return monitor


@pytest.mark.parametrize(("every", "steps"), [("validation", [0, 5, 9]), ("end", [0, 9])])
def test_questions_are_recorded_when_they_were_asked(every: str, steps: list[int]) -> None:
    trajectory, module = Trajectory(), SimpleNamespace()
    asked: dict[int, float] = {0: 3.0, 5: 2.0 if every == "validation" else 3.0, 9: 1.0}
    for step in (0, 5, 9):
        seen = asked[step] if step < 9 or every == "validation" else 3.0  # at the end, those of the beginning still
        trajectory.on_validation_end(trainer(step, choices(every, loss=seen), val_loss=1.0), module)  # type: ignore[arg-type]
    trajectory.end(trainer(9, choices(every, loss=asked[9])))
    found = trajectory.kept["forgetting_choice_loss"]
    assert found.steps.tolist() == steps
    assert found.values[:, 0].tolist() == [asked[step] for step in steps]
    assert [row.get("forgetting_choice_loss") for row in trajectory.rows] == [
        None,
        None,
        1.0 if every == "end" else None,
    ]


def test_losses_are_taken_apart_in_validation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start from data takes the gradient of the loss, also after a validation that failed."""
    seen: list[bool] = []

    def step(self: MeasuredModule, *_: Any) -> None:
        seen.append(self._validates)
        raise ZeroDivisionError

    monkeypatch.setattr(CausalLMModule, "validation_step", step)
    monkeypatch.setattr(CausalLMModule, "on_validation_epoch_start", lambda self: None)
    module = measured(losses=[1], scores=[1.0])
    with pytest.raises(ZeroDivisionError):
        module.validation_step({}, 0)
    assert (seen, module._validates) == ([True], False)
    module.on_validation_epoch_start()
    assert (module.losses, module.scores) == ([], [])


@pytest.mark.parametrize("metric", [AnswerAccuracy(), TaskAccuracy({"sums": right_answer, "other": right_answer})])
def test_an_answer_is_judged_by_itself(metric: Any) -> None:
    task = [["sums"]] if isinstance(metric, TaskAccuracy) else []
    module = measured(metric=metric)
    record = {"generation": "The answer is: 4", "reference": "4", "task": "sums"}
    for generation in ("5", "5", "4"):  # whatever came before
        metric.update([f"The answer is: {generation}"], ["4"], *task)
        assert module._score(record) == 1
        assert module._score({**record, "generation": "5"}) == 0
