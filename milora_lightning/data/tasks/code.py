"""Code as in the paper: Code-Feedback for training, HumanEval for testing."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric

from milora_lightning.data.files import Files
from milora_lightning.metrics.code import PassRate, Problem
from milora_lightning.metrics.sandbox import Limits, require_sandbox
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

INSTRUCTION = "Complete the following Python function.\n\n```python\n{prompt}\n```"
FORMATS = (("query", "answer"), ("instruction", "output"), ("prompt", "completion"))
"""Fields of question and answer in Code-Feedback's filtered part, Alpaca's format and OpenAI's."""


def programming(record: dict[str, Any]) -> dict[str, Any]:
    r"""Convert a record of Code-Feedback or HumanEval to one form.

    The reference of a problem is the problem itself, whose tests are to be run.

    Raises:
        ValueError: If the record has none of the known fields.

    >>> programming({"query": "One?", "answer": "1"})
    {'instruction': 'One?', 'output': '1', 'answer': ''}
    >>> problem = {"prompt": "def f():\n", "canonical_solution": "    pass\n", "entry_point": "f", "test": "def check"}
    >>> programming(problem)["output"]
    '```python\ndef f():\n    pass\n```'
    """
    if "entry_point" in record:
        problem = Problem(record["prompt"], record["entry_point"], record["test"])
        solution = problem.prompt + (record.get("canonical_solution") or "")
        return {
            "instruction": INSTRUCTION.format(prompt=problem.prompt.rstrip()),
            "output": f"```python\n{solution.strip()}\n```",
            "answer": problem.written(),
        }
    for question, answer in FORMATS:
        if isinstance(record.get(answer), str) and question in record:
            return {"instruction": record[question], "output": record[answer], "answer": ""}
    pairs = ", ".join(" and ".join(pair) for pair in FORMATS)
    raise InvalidInputError(
        f"there is no programming task among the fields {sorted(record)}: {pairs}, and HumanEval's prompt, entry_point "
        "and test are known."
    )


class Code(Files):
    """Code-Feedback and HumanEval.

    The test asks for each function and scores the answer by running it with HumanEval's tests. **This runs programs
    written by a model** and must be allowed by ``run_generated_code``. They run in separate processes with limits
    (:mod:`milora_lightning.metrics.sandbox`), but to be safe from malicious programs, run everything in a container.
    The result is ``pass@1``; :func:`milora_lightning.metrics.pass_rates` estimates pass@k from several samples.

    Args:
        train: Training data: files or a Hub name, as for :class:`Files`, with ``query`` and ``answer``, ``instruction``
            and ``output``, or ``prompt`` and ``completion``.
        test: HumanEval, or problems in its format: ``prompt``, ``entry_point`` and ``test``.
        validation: Validation data, in the format of training data.
        run_generated_code: Whether the test may run what the model writes.
        seconds: Time limit of a program.
        memory_gb: Memory limit of a program in GB.
        train_split: The split to train on, or a part of it, also for files: ``"train[:100000]"``.
        validation_size: How much of ``train`` to hold out if ``validation`` is None: a number of examples, or a
            fraction below 1.
        seed: Seed for choosing the examples held out.

    Raises:
        ValueError: When loading, as for :class:`Files`; in ``check_test``, if ``run_generated_code`` is false.
    """

    takes_splits_beside = False
    convert = staticmethod(programming)

    def __init__(
        self,
        train: str | list[str] | None = "m-a-p/CodeFeedback-Filtered-Instruction",
        test: str | list[str] | None = "openai/openai_humaneval",
        validation: str | list[str] | None = None,
        run_generated_code: bool = False,
        seconds: float = 10.0,
        memory_gb: float = 4.0,
        train_split: str = "train",
        validation_size: int | float = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train,
            validation,
            test,
            prompt_field="instruction",
            response_field="output",
            input_field=None,
            reference_field="answer",
            train_split=train_split,
            validation_size=validation_size,
            seed=seed,
        )
        self.run_generated_code = run_generated_code
        self.limits = Limits(seconds, memory_gb)

    def metric(self) -> Metric | None:
        """Return the metric, pass@1; None if running generated programs is not allowed."""
        return PassRate(self.limits) if self.run_generated_code else None

    def check_test(self) -> None:
        """Refuse a test that may not run programs, and warn of one that does.

        Raises:
            ValueError: If ``run_generated_code`` is false.
            ModuleNotFoundError: If programs cannot be confined on this system.
        """
        if not self.run_generated_code:
            raise InvalidInputError(
                "The test runs programs that the model writes. Allow it by data.source.run_generated_code: true, best "
                "in a container; or let predict write the answers, which runs nothing."
            )
        require_sandbox()
        warn(
            "Programs that the model writes are run on this machine, each in a process of its own with "
            f"{self.limits.seconds:g} s and {self.limits.memory_gb:g} GB. That keeps accidents off, not intent: use a "
            "container for models that you do not trust."
        )
