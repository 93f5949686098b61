"""Mathematics as in the paper: MetaMathQA for training, GSM8K and MATH for testing."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torchmetrics import Metric

from milora_lightning.data.files import Files
from milora_lightning.metrics import TaskAccuracy, extract_solution, right_answer, right_solution
from milora_lightning.metrics.latex import require_math_verify
from milora_lightning.metrics.metamath import right_expression, right_number
from milora_lightning.utils.errors import InvalidInputError

# Fields of question and solution in MetaMathQA, GSM8K, MATH, and the test files that MetaMath ships.
UNCHANGED = ("query", "response")  # MetaMathQA's fields, which are learned unchanged
FORMATS = (UNCHANGED, ("question", "answer"), ("problem", "solution"), ("instruction", "output"))
MARKER = "The answer is: "
METAMATH = "metamath"
"""Name of the paper's rule in results."""


def worked_solution(record: dict[str, Any]) -> dict[str, Any]:
    r"""Convert a record of GSM8K or MATH to MetaMathQA's form: solutions end with "The answer is: ...".

    MetaMathQA's solutions are not changed, nor are others that state their answer in this form.

    Raises:
        ValueError: If the record has none of the known pairs of fields.

    >>> worked_solution({"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5.\n#### 5"})
    {'instruction': '2 + 3?', 'output': '2 + 3 = 5.\nThe answer is: 5', 'answer': '5'}
    >>> worked_solution({"query": "2 + 3?", "response": "2 + 3 = 5.\n#### 5\nThe answer is: 5"})["output"]
    '2 + 3 = 5.\n#### 5\nThe answer is: 5'
    >>> worked_solution({"problem": "$6x=3$", "solution": r"So $x=\boxed{\frac12}$."})["output"]
    'So $x=\\boxed{\\frac12}$.\nThe answer is: \\frac12'
    """
    for question, solution in FORMATS:
        if isinstance(record.get(solution), str) and question in record:
            text = record[solution]
            break
    else:
        pairs = ", ".join(" and ".join(pair) for pair in FORMATS)
        raise InvalidInputError(
            f"there is no question with a solution among the fields {sorted(record)}: {pairs} are known."
        )
    converts = (question, solution) != UNCHANGED and MARKER.strip() not in text
    if converts:
        text = re.sub(r"<<[^<>]*>>", "", text)  # GSM8K's calculator annotations
        text = re.sub(r"####\s*(?=[^#]*$)", MARKER, text)
    answer = extract_solution(text)
    if converts and answer is not None and MARKER.strip() not in text:
        text += f"\n{MARKER}{answer}"
    return {"instruction": record[question], "output": text, "answer": answer or text}


class Math(Files):
    """MetaMathQA, GSM8K and MATH.

    Each location may hold data of all three. Their records are distinguished by their fields (``query`` and
    ``response``, ``question`` and ``answer``, ``problem`` and ``solution``, or ``instruction`` and ``output``) and
    converted to MetaMathQA's form, in which a solution ends with "The answer is: ...". The answer is extracted from
    there, and a text without one is wrong. Answers to GSM8K are compared as numbers, answers to MATH as expressions.

    Accuracies are reported by two rules: this package's, which compares values, and, as ``accuracy_metamath``, that of
    the paper's scripts (:mod:`milora_lightning.metrics.metamath`), for comparison with the paper's results.

    Args:
        train: Training data: files or a Hub name, as for :class:`Files`.
        gsm8k: GSM8K's test data; None to leave it out.
        math: MATH's test data; None to leave it out.
        validation: Validation data, scored like MATH if that is tested, otherwise like GSM8K.
        train_split: The split to train on, or a part of it, also for files: ``"train[:100000]"``.
        validation_size: How much of ``train`` to hold out if ``validation`` is None: a number of examples, or a
            fraction below 1.
        seed: Seed for choosing the examples held out.

    Raises:
        ModuleNotFoundError: In ``metric``, if MATH is tested and math-verify is not installed.
        ValueError: When loading, as for :class:`Files`.
    """

    takes_splits_beside = False
    convert = staticmethod(worked_solution)

    def __init__(
        self,
        train: str | list[str] | None = "meta-math/MetaMathQA",
        gsm8k: str | list[str] | None = "openai/gsm8k:main",
        math: str | list[str] | None = "DigitalLearningGmbH/MATH-lighteval",
        validation: str | list[str] | None = None,
        train_split: str = "train",
        validation_size: int | float = 0,
        seed: int = 0,
    ) -> None:
        tests = {name: location for name, location in (("gsm8k", gsm8k), ("math", math)) if location}
        super().__init__(
            train,
            validation,
            tests or None,
            prompt_field="instruction",
            response_field="output",
            input_field=None,
            reference_field="answer",
            train_split=train_split,
            validation_size=validation_size,
            seed=seed,
        )

    def metric(self) -> Metric:
        """Return the metric: the accuracy on each test, and their mean, by the two rules."""
        number = partial(right_answer, strict=True)
        if "math" not in self.test_sets:
            return TaskAccuracy({"": number, "gsm8k": number}, {METAMATH: {"": right_number, "gsm8k": right_number}})
        require_math_verify()  # fail now, not after the first answers
        return TaskAccuracy(
            {"": right_solution, "gsm8k": number, "math": right_solution},
            {METAMATH: {"": right_expression, "gsm8k": right_number, "math": right_expression}},
        )
