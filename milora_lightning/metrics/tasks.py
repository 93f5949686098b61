"""Accuracy on several test sets, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from milora_lightning.utils.errors import InvalidInputError

Judge = Callable[[str, str], bool]
"""Returns whether a generated text is right, given the reference."""


class TaskAccuracy(Metric):
    """Fraction of right texts for each task, and the mean over tasks with equal weights.

    Args:
        judges: For each task name, the function that decides whether a text is right; ``""`` is the unnamed task.
        other_rules: Further judges of the same tasks, by name of the rule. Each rule is reported in addition to the
            first, as ``accuracy_RULE`` and ``accuracy_RULE/NAME``.

    Raises:
        ValueError: If a rule lacks a task; in ``update``, if a task has no judge, or the lengths differ.

    >>> metric = TaskAccuracy({"spelling": str.__eq__, "length": lambda text, reference: len(text) == len(reference)})
    >>> metric.update(["cat", "dgo", "hat"], ["cat", "dog", "box"], ["spelling", "spelling", "length"])
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'accuracy': 0.75, 'accuracy/spelling': 0.5, 'accuracy/length': 1.0}
    >>> metric = TaskAccuracy({"": str.__eq__}, {"caseless": {"": lambda text, wanted: text.lower() == wanted.lower()}})
    >>> metric.update(["cat", "Dog"], ["cat", "dog"], ["", ""])
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'accuracy': 0.5, 'accuracy_caseless': 1.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(
        self, judges: Mapping[str, Judge], other_rules: Mapping[str, Mapping[str, Judge]] | None = None
    ) -> None:
        super().__init__()
        self.judges = dict(judges)
        self.other_rules = {rule: dict(others) for rule, others in (other_rules or {}).items()}
        for rule, others in self.other_rules.items():
            if others.keys() != self.judges.keys():
                raise InvalidInputError(f"The rule {rule!r} judges {list(others)}, but has to judge {list(judges)}.")
        # Every rank has a count for every task, even for unseen tasks, so that sums over ranks are aligned.
        for name in ("correct", "total", *map(_state, self.other_rules)):
            self.add_state(name, torch.zeros(len(self.judges), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, generations: Sequence[str], references: Sequence[str], tasks: Sequence[str]) -> None:
        """Count the right texts of each task."""
        if not len(generations) == len(references) == len(tasks):
            raise InvalidInputError(
                f"There are {len(generations)} generated texts, {len(references)} references and {len(tasks)} tasks."
            )
        for generation, reference, task in zip(generations, references, tasks, strict=True):
            if task not in self.judges:
                raise InvalidInputError(f"There is no task {task!r}, only {list(self.judges)}.")
            index = list(self.judges).index(task)
            self.total[index] += 1
            self.correct[index] += self.judges[task](generation, reference)
            for rule, others in self.other_rules.items():
                getattr(self, _state(rule))[index] += others[task](generation, reference)

    def compute(self) -> dict[str, Tensor]:
        """Return ``accuracy``, the mean over the tasks that had texts, and ``accuracy/NAME`` of each named one."""
        results = self._accuracies("accuracy", self.correct)
        for rule in self.other_rules:
            results |= self._accuracies(f"accuracy_{rule}", getattr(self, _state(rule)))
        return results

    def _accuracies(self, name: str, correct: Tensor) -> dict[str, Tensor]:
        seen = self.total > 0
        accuracies = correct / self.total
        named = {f"{name}/{task}": accuracies[i] for i, task in enumerate(self.judges) if task and seen[i]}
        return {name: accuracies[seen].mean(), **named}


def _state(rule: str) -> str:
    return f"correct_{rule}"
