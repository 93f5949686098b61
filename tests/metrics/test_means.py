"""Means over tasks, which count the same however many texts they have."""

from __future__ import annotations

import pytest
import torch

from milora_lightning.metrics import TaskAccuracy, right_answer
from milora_lightning.metrics.losses import MeanLoss


def equal(text: str, wanted: str) -> bool:
    return text == wanted


def test_tasks_count_the_same_and_those_without_texts_not_at_all() -> None:
    metric = TaskAccuracy(
        {"large": equal, "small": equal, "unseen": equal},
        {"loose": dict.fromkeys(("large", "small", "unseen"), lambda text, wanted: text[0] == wanted[0])},
    )
    metric.update(["a"] * 8 + ["ab"], ["a"] * 6 + ["b", "ab", "abc"], ["large"] * 8 + ["small"])
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx(
        {
            "accuracy": (6 / 8 + 0) / 2,
            "accuracy/large": 6 / 8,
            "accuracy/small": 0,
            "accuracy_loose": (7 / 8 + 1) / 2,
            "accuracy_loose/large": 7 / 8,
            "accuracy_loose/small": 1,
        }
    )
    metric.reset()
    metric.update(["a"], ["a"], ["unseen"])
    assert {name: value.item() for name, value in metric.compute().items() if "_" not in name} == {
        "accuracy": 1.0,
        "accuracy/unseen": 1.0,
    }


def test_counts_of_ranks_are_added_task_by_task() -> None:
    one, other, both = (TaskAccuracy({"a": equal, "b": equal}) for _ in range(3))
    first, second = (["x", "y"], ["x", "x"], ["a", "b"]), (["x"], ["x"], ["b"])
    one.update(*first)
    other.update(*second)
    both.update(*first)
    both.update(*second)
    for name in ("correct", "total"):  # as torchmetrics adds them up
        assert torch.equal(getattr(one, name) + getattr(other, name), getattr(both, name))


def test_words_are_compared_without_their_case() -> None:
    assert right_answer("The answer is: TRUE", "true")
    assert right_answer("The answer is: Straße", "strasse")
    assert not right_answer("The answer is: false", "true")


def test_tokens_count_the_same_in_a_mean_loss_which_begins_again_after_a_reset() -> None:
    metric = MeanLoss()
    for _ in range(2):
        metric.update(torch.tensor(10.0), torch.tensor(1))
        metric.update(torch.tensor(9.0, requires_grad=True), torch.tensor(9))
        assert metric.compute().item() == pytest.approx(1.9)
        assert not metric.total.requires_grad
        metric.reset()
    metric.update(torch.tensor(torch.nan), torch.tensor(3))
    metric.update(torch.tensor(1.0), torch.tensor(1))
    assert metric.compute().isnan()  # what has diverged is not left out


def test_sums_of_ranks_are_added_in_a_mean_loss() -> None:
    ranks = [MeanLoss(), MeanLoss()]
    ranks[0].update(torch.tensor(10.0), torch.tensor(1))
    ranks[1].update(torch.tensor(9.0), torch.tensor(9))
    both = MeanLoss()
    for name, reduce in both._reductions.items():
        setattr(both, name, reduce(torch.stack([getattr(each, name) for each in ranks])))
    both._update_count = 1
    assert both.compute().item() == pytest.approx(1.9)


def test_a_rule_for_other_tasks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'loose' judges \['b'\], but has to judge \['a'\]"):
        TaskAccuracy({"a": equal}, {"loose": {"b": equal}})
