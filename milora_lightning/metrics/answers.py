"""Accuracy of the final answers in generated texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from milora_lightning.metrics.numbers import is_number, read_number
from milora_lightning.utils.errors import InvalidInputError

MARKER = r"the answer is:|####"  # as in the paper, and as in GSM8K's references

# Numbers within a text. A sign belongs to one only if no operand comes before it: "10-5" ends in 5, "= -5" in -5.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-−]\s?)?[$€£¥]?(?:(?<=[$€£¥])[-−])?"
    r"(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:\s?/\s?\d+)?"
)


def extract_answer(text: str, pattern: str = MARKER, strict: bool = False) -> str | None:
    """Extract the answer from a generated text.

    Args:
        text: The text.
        pattern: Regular expression (case-insensitive) for the marker before the answer. The last match counts; the
            answer is the first line after it, or the LaTeX environment that begins there.
        strict: Whether a text without the marker has no answer; otherwise its answer is the last number in the text.

    Returns:
        The answer as it is written, or None if there is none.

    >>> extract_answer("3 + 4 = 7, so 7 apples. The answer is: 7 apples.")
    '7 apples.'
    >>> extract_answer("3 + 4 = 7, so there are 7.")
    '7'
    >>> extract_answer("3 + 4 = 7, so there are 7.", strict=True) is None
    True
    """
    markers = list(re.finditer(pattern, text, re.IGNORECASE))
    if markers:
        return _first_line(text[markers[-1].end() :].strip())
    numbers = [] if strict else list(_NUMBER.finditer(text))
    return numbers[-1].group() if numbers else None


def same_answer(answer: str, reference: str) -> bool:
    """Compare two answers: numbers by exact value, ignoring format and unit; other texts case-insensitively.

    For the reading of numbers see :func:`milora_lightning.metrics.numbers.read_number`.

    Args:
        answer: The answer to judge.
        reference: The right answer.

    Returns:
        Whether they are the same.

    >>> same_answer("$1,234.00 in total.", "1234"), same_answer("0.75", "3/4"), same_answer("-5", "5")
    (True, True, False)
    >>> same_answer("17 + 1 = 18", "18"), same_answer("10 1/2", "10.5"), same_answer("5 or 6", "5")
    (True, True, False)
    >>> same_answer("True.", "true"), same_answer("x = 4", "4"), same_answer("four", "4")
    (True, True, False)
    """
    answer, reference = _strip_markup(answer), _strip_markup(reference)
    expected = read_number(reference, whole=True)
    if expected is not None:
        return read_number(answer) == expected
    return answer.casefold() == reference.casefold()


def right_answer(generation: str, reference: str, pattern: str = MARKER, strict: bool = False) -> bool:
    """Return whether a generated text ends in the right answer.

    Args:
        generation: The text.
        reference: A whole solution with the marker, or only the answer.
        pattern: See :func:`extract_answer`.
        strict: Whether a generation without the marker is wrong; otherwise its last number is compared, and a
            generation identical to the reference is right.

    >>> right_answer("It is 5.", "It is 5."), right_answer("It is 6.", "It is 5.")
    (True, False)
    >>> right_answer("2 + 2 = 4. The answer is: 4", "#### 4"), right_answer("That makes 4.", "4", strict=True)
    (True, False)
    >>> right_answer("I guess 10.", "10 - 3 = 7"), right_answer("The answer is: 10 - 3 = 7.", "10 - 3 = 7")
    (False, True)
    """
    if not strict and generation.strip() and generation.strip() == reference.strip():
        return True
    expected = extract_answer(reference, pattern, strict=True)
    if expected is None and len(_NUMBER.findall(reference)) > 1 and not is_number(reference):
        said = extract_answer(generation, pattern, strict=True) or ("" if strict else generation)
        return _strip_markup(said).casefold() == _strip_markup(reference).casefold()
    answer = extract_answer(generation, pattern, strict)
    return answer is not None and same_answer(answer, expected or reference)


def _strip_markup(answer: str) -> str:
    return answer.lstrip(" \t\r\n*`\"'").rstrip(" \t\r\n*`\"'.")


def _first_line(text: str) -> str | None:
    r"""Return the first line that is more than a formula's delimiter; if it begins an environment, all of that.

    >>> _first_line("\\[\n5\n\\]"), _first_line("\\begin{pmatrix}\n1\n\\end{pmatrix}\nBye.")
    ('5', '\\begin{pmatrix}\n1\n\\end{pmatrix}')
    """
    lines = [line.strip() for line in text.splitlines()]
    first = next((i for i, line in enumerate(lines) if re.search(r"\w", line)), 0)
    for last in range(first, len(lines)):
        answer = "\n".join(lines[first : last + 1])
        if answer.count(r"\begin{") <= answer.count(r"\end{"):
            return answer
    return lines[first] if lines else None


class AnswerAccuracy(Metric):
    """Fraction of generated texts whose answer is right.

    Args:
        pattern: Regular expression for the marker before the answer, see :func:`extract_answer`. A reference may be a
            whole solution with the marker, or only the answer.
        strict: Whether a generated text without the marker is wrong; otherwise its last number is compared.

    Raises:
        ValueError: In ``update``, if the numbers of references and generated texts differ.

    >>> metric = AnswerAccuracy()
    >>> metric.update(["2 + 2 = 4. The answer is: 4", "The answer is: 5"], ["4", "2 * 3 = 6. The answer is: 6"])
    >>> metric.compute()
    tensor(0.5000)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self, pattern: str = MARKER, strict: bool = False) -> None:
        super().__init__()
        self.pattern = pattern
        self.strict = strict
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, generations: Sequence[str], references: Sequence[str]) -> None:
        """Count the right answers among generated texts."""
        if len(generations) != len(references):
            raise InvalidInputError(f"There are {len(generations)} generated texts but {len(references)} references.")
        for generation, reference in zip(generations, references, strict=True):
            self.correct += right_answer(generation, reference, self.pattern, self.strict)
        self.total += len(generations)

    def compute(self) -> Tensor:
        """Return the fraction of right answers, NaN if there were no texts."""
        return self.correct / self.total
