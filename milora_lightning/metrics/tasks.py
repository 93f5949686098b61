"""Accuracy on several test sets, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from milora_lightning.utils.errors import InvalidInputError

Judge = Callable[[str, str], bool]
"""Tells whether a generated text is right, given the reference."""


class TaskAccuracy(Metric):
    """Fraction of right texts for each task, and the mean over tasks with equal weights.

    Args:
        judges: By task name, the function that tells whether a text is right; ``""`` is the unnamed task.

    Raises:
        ValueError: In ``update``, if a task has no judge, or the lengths differ.

    >>> metric = TaskAccuracy({"spelling": str.__eq__, "length": lambda text, reference: len(text) == len(reference)})
    >>> metric.update(["cat", "dgo", "hat"], ["cat", "dog", "box"], ["spelling", "spelling", "length"])
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'accuracy': 0.75, 'accuracy/spelling': 0.5, 'accuracy/length': 1.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self, judges: Mapping[str, Judge]) -> None:
        super().__init__()
        self.judges = dict(judges)
        # Every rank has a count for every task, even one that it has not seen, so that sums over ranks line up.
        self.add_state("correct", torch.zeros(len(self.judges), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(self.judges), dtype=torch.long), dist_reduce_fx="sum")

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
            self.correct[index] += self.judges[task](generation, reference)
            self.total[index] += 1

    def compute(self) -> dict[str, Tensor]:
        """Return ``accuracy``, the mean over the tasks that had texts, and ``accuracy/NAME`` of each named one."""
        seen = self.total > 0
        accuracies = self.correct / self.total
        named = {f"accuracy/{task}": accuracies[i] for i, task in enumerate(self.judges) if task and seen[i]}
        return {"accuracy": accuracies[seen].mean(), **named}
