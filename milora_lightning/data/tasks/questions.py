"""Multiple-choice questions as plain text, whose choices a language model ranks by their likelihood."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milora_lightning.utils.errors import InvalidInputError, MissingFileError

_CHOICES = re.compile(r"\s*(?:Answer|Solution|Ending|Option)(\d): ?")
_FORMAT = re.compile(r"\s*Answer format: \S+\s*$")
_ASKS = re.compile(
    r"^Please (?:choose the correct \w+ to .*?(?:question|sentence)|answer the following question with true or false, "
    r"question): ?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        prompt: The text before a choice.
        choices: The choices as continuations of the prompt, including the space before them.
        right: The index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    right: int


def read_questions(location: str, number: int, seed: int = 0) -> list[Question]:
    """Read questions, and draw some of them.

    Args:
        location: A JSON file with a list of records, or one record a line. A record has the fields ``question``,
            ``choices`` (a list of texts) and ``answer`` (the number of the right one, from 0, or its text); or it is
            one of the files of LLM-Adapters, with ``instruction`` and ``answer``, of any of the tasks of
            :class:`milora_lightning.data.Commonsense`.
        number: Maximum number of questions.
        seed: Seed of the draw.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a record is not such a question.
    """
    path = Path(location).expanduser()
    if not path.is_file():
        raise MissingFileError(f"There is no file of questions {path.absolute()}. Check the path.")
    records = _records(path)
    chosen = np.random.default_rng(seed).permutation(len(records))[:number]
    questions = []
    for index in sorted(map(int, chosen)):
        try:
            questions.append(read_question(records[index]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InvalidInputError(
                f"Record {index + 1} of {path} is no multiple-choice question ({error}): it needs the fields question, "
                "choices and answer, or instruction and answer as the files of LLM-Adapters have them."
            ) from error
    if not questions:
        raise InvalidInputError(f"There are no questions in {path}. Point to a file that is not empty.")
    return questions


def read_question(record: dict[str, Any]) -> Question:
    r"""Read one question.

    >>> read_question({"question": "2 + 2?", "choices": ["3", "4"], "answer": "4"})
    Question(prompt='Question: 2 + 2?\nAnswer:', choices=(' 3', ' 4'), right=1)
    >>> text = "Please choose the correct answer to the question: Is it?\n\nAnswer1: Yes Answer2: No\n\n"
    >>> read_question({"instruction": text + "Answer format: answer1/answer2", "answer": "answer2"})
    Question(prompt='Question: Is it?\nAnswer:', choices=(' Yes', ' No'), right=1)

    Raises:
        ValueError: If the record is not a question.
    """
    if "choices" in record:
        choices, answer = [str(choice) for choice in record["choices"]], record["answer"]
        right = answer if isinstance(answer, int) else choices.index(str(answer))
        return _question(str(record["question"]), choices, right)
    text = _FORMAT.sub("", _ASKS.sub("", str(record["instruction"])))
    answer = str(record["answer"])
    if answer in ("true", "false"):
        return _question(text, ["true", "false"], ["true", "false"].index(answer))
    parts = _CHOICES.split(text)
    question, choices = parts[0].strip(), [part.strip() for part in parts[2::2]]
    right = int(re.sub(r"\D", "", answer)) - 1
    if answer.startswith("option") and question.count("_") == 1:  # the choices fill a blank
        before, after = question.split("_")
        choices = [f"{choice}{after}" for choice in choices]
        return _checked(Question(before.rstrip(), tuple(f" {choice}" for choice in choices), right))
    if answer.startswith("ending"):  # the choices continue the sentence
        return _checked(Question(question, tuple(f" {choice}" for choice in choices), right))
    return _question(question, choices, right)


def _question(question: str, choices: list[str], right: int) -> Question:
    return _checked(Question(f"Question: {question.strip()}\nAnswer:", tuple(f" {c}" for c in choices), right))


def _checked(question: Question) -> Question:
    if not (len(question.choices) > 1 and 0 <= question.right < len(question.choices) and question.prompt):
        raise InvalidInputError(f"{len(question.choices)} choices, of which number {question.right + 1} is the answer")
    return question


def _records(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8").strip()
        if text.startswith("["):
            return list(json.loads(text))
        # Not splitlines, which breaks lines at characters that JSON may hold.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise InvalidInputError(f"{path} is neither a list in JSON nor JSON lines ({error}). Convert it.") from error
