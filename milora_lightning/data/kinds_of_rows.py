"""The kinds of rows in a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import datasets

from milora_lightning.data.encoding.turn_encoding import choose_turns
from milora_lightning.data.tokenizing import holds


def holds_questions(dataset: datasets.Dataset) -> bool:
    """Whether there are rows whose last question has no answer."""
    rows = zip(dataset["prompt"], dataset["response"], strict=True)
    if any(prompt and not response.strip() for prompt, response in rows):
        return True
    talks = dataset["messages"] if "messages" in dataset.column_names else []
    return any(choose_turns(talk, "").asks for talk in talks if talk)


def kinds_of(dataset: datasets.Dataset) -> tuple[bool, bool]:
    """Return whether there are conversations among the rows, and whether all rows are plain texts."""
    return holds(dataset, "messages"), holds(dataset, "text", all_rows=True)


def first_of_each(tasks: Sequence[str], number: int) -> list[int]:
    """Return the indices of the first examples of each task.

    >>> first_of_each(["a", "a", "b", "a", "b"], 2)
    [0, 1, 2, 4]
    """
    seen: Counter[str] = Counter()
    first = []
    for index, task in enumerate(tasks):
        seen[task] += 1
        if seen[task] <= number:
            first.append(index)
    return first
