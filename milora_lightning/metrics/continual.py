"""Measures of continual learning: averages over the matrix of results after each task of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple


class Continual(NamedTuple):
    """How well a sequence of tasks was learned and kept.

    Attributes:
        average: The mean of all tasks at the end.
        backward_transfer: How much better earlier tasks are at the end than right after they were learned, on average
            (arXiv 1706.08840): negative if they have been forgotten. None for a single task.
        forgetting: How much worse they are at the end than at their best since they were learned, on average (arXiv
            1801.10112). Zero or more.
        forward_transfer: How much better later tasks are right before they are learned than before all training.
    """

    average: float
    backward_transfer: float | None
    forgetting: float | None
    forward_transfer: float | None


def continual(matrix: Sequence[Sequence[float]], higher_is_better: bool) -> Continual:
    """Summarize the results of a sequence of T tasks.

    Args:
        matrix: T + 1 rows of T results each: of all tasks before training, after the first task, and so on.
        higher_is_better: True for accuracies, False for losses.

    >>> continual([[0.0, 0.0], [0.8, 0.1], [0.6, 0.9]], higher_is_better=True)
    Continual(average=0.75, backward_transfer=-0.2, forgetting=0.2, forward_transfer=0.1)
    """
    sign, last, tasks = (1 if higher_is_better else -1), matrix[-1], len(matrix) - 1
    if tasks < 2:
        return Continual(mean(last), None, None, None)
    earlier, later = range(tasks - 1), range(1, tasks)
    backward = mean(sign * (last[j] - matrix[j + 1][j]) for j in earlier)
    best = [max(sign * row[j] for row in matrix[j + 1 :]) for j in earlier]
    forgetting = mean(best[j] - sign * last[j] for j in earlier)
    forward = mean(sign * (matrix[j][j] - matrix[0][j]) for j in later)
    return Continual(mean(last), *(round(value, 12) for value in (backward, forgetting, forward)))
