"""Averages over a sequence of tasks, against their definitions, and which results and options reach a measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from milora_lightning.metrics import AnswerAccuracy
from milora_lightning.metrics.continual import continual
from milora_lightning.metrics.results import results


@pytest.mark.parametrize("seed", range(3))
def test_transfer_and_forgetting_are_their_definitions_for_accuracies_and_losses(seed: int) -> None:
    R = np.random.default_rng(seed).uniform(size=(5, 4))  # before training, and after each of four tasks
    found = continual(R.tolist(), higher_is_better=True)
    assert found.average == pytest.approx(R[4].mean())
    assert found.backward_transfer == pytest.approx(np.mean([R[4, j] - R[j + 1, j] for j in range(3)]))
    assert found.forgetting == pytest.approx(np.mean([R[j + 1 :, j].max() - R[4, j] for j in range(3)]))
    assert found.forward_transfer == pytest.approx(np.mean([R[j, j] - R[0, j] for j in range(1, 4)]))
    of_losses = continual((1 - R).tolist(), higher_is_better=False)
    assert of_losses[1:] == pytest.approx(found[1:])
    assert of_losses.average == pytest.approx(1 - found.average)


def test_what_was_known_before_a_task_was_learned_is_not_forgotten() -> None:
    assert continual([[0.9, 0.0], [0.5, 0.0], [0.5, 0.7]], higher_is_better=True).forgetting == 0
    assert continual([[0.1], [0.4]], higher_is_better=True) == (0.4, None, None, None)


def test_the_rule_of_answers_is_the_one_that_was_asked_for() -> None:
    texts, wanted = ["Solution: 4, not 5.", "That makes 4.", "The answer is: 4"], ["4"] * 3
    for options, right in (({}, 2), ({"pattern": "solution:"}, 3), ({"strict": True}, 1)):
        metric = AnswerAccuracy(**options)
        metric.update(texts[:1], wanted[:1])
        metric.update(texts[1:], wanted[1:])
        assert metric.compute().item() == pytest.approx(right / 3)


def test_results_are_those_of_the_stages_and_of_what_is_measured_beside_them() -> None:
    names = ["train_loss", "val_loss", "test_accuracy", "forgetting_kl/a", "update_size", "lr", "value_loss"]
    metrics = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    assert list(results(metrics, "val")) == ["val_loss", "forgetting_kl/a", "update_size"]
    assert list(results(metrics, "val", "test")) == [*names[1:5]]
    assert results(metrics) == {"forgetting_kl/a": 3.0, "update_size": 4.0}
