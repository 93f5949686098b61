"""The commonsense benchmark of LLM-Adapters: one training mix, eight test sets."""

from __future__ import annotations

import re

from torchmetrics import Metric

from milora_lightning.data.files import Files
from milora_lightning.metrics import TaskAccuracy, right_choice
from milora_lightning.utils.errors import InvalidInputError

TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
RESPONSE = "the correct answer is {}"  # the form of answers in the benchmark's data


class Commonsense(Files):
    """Commonsense170K and BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA.

    Records have the fields ``instruction``, ``output`` ("the correct answer is answer2") and ``answer`` ("answer2"). As
    in the benchmark's official evaluation, an answer is right if the first choice that it names is the right one. The
    accuracy is the mean over the test sets.

    Args:
        train: The training mix: files or a Hub name, as for :class:`Files`.
        test: Location of the test sets, with ``{task}`` in place of the name of the set: ``dataset/{task}/test.json``
            in a clone of LLM-Adapters. None for no test.
        tasks: Names of the test sets.
        validation: Validation data; None to hold ``validation_size`` examples out of ``train``.
        validation_size: How much to hold out, a number of examples or a fraction below 1; the benchmark holds out 120.
        seed: Seed for choosing the examples held out.

    Raises:
        ValueError: If ``test`` does not contain ``{task}``; when loading, as for :class:`Files`.
    """

    takes_splits_beside = False

    def __init__(
        self,
        train: str | list[str] | None = "zwhe99/commonsense_170k",
        test: str | None = None,
        tasks: list[str] | None = None,
        validation: str | list[str] | None = None,
        validation_size: int | float = 120,
        seed: int = 0,
    ) -> None:
        tasks = list(TASKS) if tasks is None else tasks
        if test is not None and "{task}" not in test:
            raise InvalidInputError(
                f"test={test!r} holds all test sets, so {{task}} must stand where a task's name belongs."
            )
        super().__init__(
            train,
            validation,
            None if test is None else {task: test.replace("{task}", task) for task in tasks},
            prompt_field="instruction",
            response_field="output",
            input_field=None,
            reference_field="answer",
            validation_size=validation_size,
            seed=seed,
        )

    def metric(self) -> Metric:
        """Return the metric: accuracies of the test sets and their mean; validation is scored as one set."""
        return TaskAccuracy(dict.fromkeys(["", *self.test_sets], right_choice))

    def choices(self, prompt: str) -> list[str]:
        r"""Return the possible answers to a question.

        Raises:
            ValueError: If the prompt does not name them.

        >>> Commonsense().choices("Is water wet?\n\nAnswer format: true/false")
        ['the correct answer is true', 'the correct answer is false']
        """
        found = re.findall(r"Answer format: (\S+)", prompt)
        if not found:
            raise InvalidInputError(
                f"The question has no line 'Answer format: .../...', which names the choices: {prompt!r}."
            )
        return [RESPONSE.format(choice) for choice in found[-1].split("/")]
