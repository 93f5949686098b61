"""FollowBench: instructions with one to five constraints, answered in the format of its official evaluation."""

from __future__ import annotations

from typing import Any

import datasets

from milora_lightning.data.files import Files
from milora_lightning.data.sources import Split
from milora_lightning.utils.errors import InvalidInputError

TYPES = ("content", "situation", "style", "format", "example", "mixed")
INITIAL = "0"
"""Level of an instruction without constraints, which is not evaluated."""


def constrained(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of FollowBench to a question with its level; ``target`` is not used, as only some rules need it.

    Raises:
        ValueError: If the record is of another format.
    """
    if missing := [name for name in ("instruction", "level") if name not in record]:
        raise InvalidInputError(
            f"there is no {' and no '.join(missing)} among the fields {sorted(map(str, record))}, which FollowBench's "
            "records have."
        )
    return {"instruction": record["instruction"], "output": "", "level": record["level"]}


class FollowBench(Files):
    """FollowBench's instructions, for ``predict``; its judges are rules and GPT-4.

    :class:`milora_lightning.PredictionWriter` writes the answers in the format of FollowBench's evaluation.

    Args:
        test: Location of the files, with ``{task}`` in place of the type of constraint:
            ``data/{task}_constraints.json`` in a clone of FollowBench.
        tasks: Types of constraint; by default all six.

    Raises:
        ValueError: If ``test`` does not contain ``{task}``; when loading, as for :class:`Files`.
    """

    takes_splits_beside = False
    convert = staticmethod(constrained)

    def __init__(self, test: str = "FollowBench/data/{task}_constraints.json", tasks: list[str] | None = None) -> None:
        if "{task}" not in test:
            raise InvalidInputError(
                f"test={test!r} holds all files, so {{task}} must stand where a type of constraint belongs."
            )
        super().__init__(
            test={task: test.replace("{task}", task) for task in (TYPES if tasks is None else tasks)},
            prompt_field="instruction",
            response_field="output",
            input_field=None,
            reference_field="level",
        )

    def load(self, split: Split) -> datasets.Dataset | None:
        """Load the instructions that have constraints."""
        dataset = super().load(split)
        if dataset is None:
            return None
        return dataset.select([i for i, level in enumerate(dataset["reference"]) if level != INITIAL])

    def metric(self) -> None:
        """Return no metric: FollowBench's evaluation judges the answers."""
