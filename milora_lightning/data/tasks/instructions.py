"""Instruction data from Alpaca's format, preference data or chats."""

from __future__ import annotations

from typing import Any

from milora_lightning.data.files import Files
from milora_lightning.data.reading.values import shown
from milora_lightning.utils.errors import InvalidInputError


def instruction(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of instruction data to Alpaca's format.

    It may have ``instruction``, ``input`` and ``output`` (Alpaca, AlpacaEval); ``prompt`` and ``chosen``, which is the
    answer or a chat that ends with it (UltraFeedback); or ``messages`` (a chat).

    Raises:
        ValueError: If the record has none of these, a message has no role or text, or the chat is not one question
            and one answer, after a system message if there is one.

    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    >>> instruction({"messages": chat}) == {"instruction": "Hi", "output": "Hello!"}
    True
    >>> instruction({"prompt": "Hi", "chosen": chat, "rejected": "Go"}) == {"instruction": "Hi", "output": "Hello!"}
    True
    """
    if "instruction" in record:
        return record
    if isinstance(record.get("chosen"), str):
        return {"instruction": _text(record.get("prompt"), "the field 'prompt'"), "output": record["chosen"]}
    field = "chosen" if record.get("chosen") else "messages"
    if not record.get(field):
        raise InvalidInputError(
            f"there is no instruction with an answer among the fields {sorted(map(str, record))}: instruction and "
            "output, prompt and chosen, or messages are known."
        )
    turns = [_turn(message, f"message {i} of {field!r}") for i, message in enumerate(_chat(record[field], field), 1)]
    roles = [role for role, _ in turns]
    if roles[-2:] != ["user", "assistant"] or roles[:-2] not in ([], ["system"]):
        raise InvalidInputError(
            f"the chat goes {roles}, but has to be a user's message and the assistant's answer. Split it."
        )
    question, answer = (content for _, content in turns[-2:])
    if roles[:-2]:
        return {"instruction": turns[0][1], "input": question, "output": answer, "prompt_role": "system"}
    return {"instruction": question, "output": answer}


def _chat(messages: Any, field: str) -> list[Any]:
    if not isinstance(messages, list):
        raise InvalidInputError(
            f"{field!r} holds {shown(messages)} ({type(messages).__name__}), but has to be a list of messages, each "
            "with role and content."
        )
    return messages


def _turn(message: Any, what: str) -> tuple[str, str]:
    """Return the role and the text of a message."""
    if not isinstance(message, dict):
        raise InvalidInputError(
            f"{what} is {shown(message)} ({type(message).__name__}), but has to have role and content."
        )
    if missing := [key for key in ("role", "content") if key not in message]:
        hint = " Rename from to role (human to user, gpt to assistant) and value to content." * ("from" in message)
        raise InvalidInputError(f"{what} has no {' and no '.join(missing)}, only {sorted(map(str, message))}.{hint}")
    return _text(message["role"], f"the role of {what}"), _text(message["content"], f"the content of {what}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidInputError(f"{what} is {shown(value)} ({type(value).__name__}), which is no text.")
    return value


class Instructions(Files):
    """Instructions to follow: UltraFeedback's chosen answers, Alpaca's, or chats of one question and one answer.

    Answers are neither right nor wrong, so evaluations report only the loss. What ``predict`` generates can be written
    for ``alpaca_eval``, see :class:`milora_lightning.PredictionWriter`.

    Args:
        train: Training data: files or a Hub name, as for :class:`Files`; see :func:`instruction` for the formats.
        validation: Validation data.
        test: Instructions to answer, with reference answers: AlpacaEval's are the file ``alpaca_eval.json``.
        train_split: The split of a Hub data set to train on; UltraFeedback's is ``train_sft``.
        validation_split: The same for validation.
        validation_size: How much of ``train`` to hold out if ``validation`` is None: a number of examples, or a
            fraction below 1.
        seed: Seed for choosing the examples held out.

    Raises:
        ValueError: When loading, as for :class:`Files`.
    """

    takes_splits_beside = False
    convert = staticmethod(instruction)

    def __init__(
        self,
        train: str | list[str] | None = "HuggingFaceH4/ultrafeedback_binarized",
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        train_split: str = "train_sft",
        validation_split: str = "test_sft",
        validation_size: int | float = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train,
            validation,
            test,
            prompt_field="instruction",
            response_field="output",
            input_field="input",
            train_split=train_split,
            validation_split=validation_split,
            validation_size=validation_size,
            seed=seed,
        )
        self.fields["prompt_role"] = "prompt_role"  # distinguishes a chat's system message from an instruction
        self.fields["task"] = "dataset"  # AlpacaEval's field, by which its results are broken down

    def metric(self) -> None:
        """Return no metric: nothing is generated in evaluations."""
