"""Means over tasks, which count the same however many texts they have."""

from __future__ import annotations

import pytest
import torch

from milora_lightning.metrics import TaskAccuracy, right_answer


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
