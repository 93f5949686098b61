"""The fields of a record that contain an example: named by the user, or recognised by common names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from milora_lightning.data.reading.conversations import is_conversation
from milora_lightning.utils.errors import InvalidInputError

Fields = dict[str, str | None]
Kind = Literal["prompts", "conversations", "texts"]

AUTO: Final = "auto"  # a field to be recognised
# The names that are recognised, ignoring case.
CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question", "query", "problem")
RESPONSES = ("output", "response", "completion", "answer", "chosen", "solution")
PARTNERS = {"instruction": "output", "prompt": "completion", "question": "answer", "problem": "solution"}
INPUTS = ("input", "context")
OTHERS = {"system": ("system", "system_prompt"), "history": ("history",), "tools": ("tools", "functions")}
TEXT = "text"
COLUMNS_IN_WORDS = ("messages", "system", "history", "prompt", "input", "response", "tools")


@dataclass(frozen=True)
class Format:
    """The kind of examples in a file, and their fields.

    Args:
        kind: Prompts with responses, conversations of any number of turns, or texts.
        fields: The field that each column is read from. A conversation has ``messages``, or ``prompt`` and
            ``response`` with ``input`` and ``history``; in both cases also ``system`` and ``tools``.
    """

    kind: Kind
    fields: Fields

    @property
    def needed(self) -> list[str]:
        """The fields that every record must have."""
        return [field for column in ("messages", TEXT, "prompt", "response") if (field := self.fields.get(column))]

    def fits(self, record: dict[str, Any]) -> bool:
        """Return whether every needed field of a record is not empty."""
        return all(dict.get(record, field) is not None for field in self.needed)

    @classmethod
    def read(cls, note: str) -> Format:
        """Return the format that :meth:`note` wrote."""
        kind, fields = json.loads(note)
        return cls(kind, fields)

    def note(self) -> str:
        """Write it as JSON."""
        return json.dumps([self.kind, self.fields])

    def in_words(self, size: int) -> str:
        """Describe a number of rows and their fields.

        >>> Format("prompts", {"prompt": "question", "input": None, "response": "answer"}).in_words(8)
        "8 rows, prompt from 'question', response from 'answer'"
        """
        what = {"prompts": "row", "conversations": "conversation", "texts": "text"}[self.kind]
        what = f"{size} {what}{'s' * (size != 1)}"
        parts = [(column, field) for column in COLUMNS_IN_WORDS if (field := self.fields.get(column))]
        if self.kind == "texts":
            return f"{what} from {self.fields[TEXT]!r}, every token to be learned"
        read = ", ".join(f"{column} from {field!r}" for column, field in parts)
        return f"{what}, {read}"

    def __str__(self) -> str:
        what = {"prompts": "a prompt and a response", "conversations": "a conversation", "texts": "a text"}[self.kind]
        return f"{what} in {' and '.join(map(repr, self.needed))}"


def settled(named: dict[str, str | None]) -> Fields:
    """Mark unnamed fields as to be recognised, except those of kinds other than the named ones.

    Raises:
        ValueError: If fields of different kinds are named.
    """
    kinds = {"prompt": "prompts", "response": "prompts", "messages": "conversations", "text": "texts"}
    given = {kinds[name] for name, field in named.items() if field not in (None, AUTO)}
    if len(given) > 1:
        names = ", ".join(f"{name}_field={field!r}" for name, field in named.items() if field not in (None, AUTO))
        raise InvalidInputError(f"{names} name more than one place of an example. Give one, and leave the others out.")
    return {name: None if field == AUTO and given - {kinds[name]} else field for name, field in named.items()}


def recognise(naming: Fields, records: list[dict[str, Any]]) -> Format | None:
    """Recognise the format of the first of several records, including further fields of the others.

    Args:
        naming: The field of each column, ``"auto"`` where it is to be recognised.
        records: Records, at least one.

    Returns:
        The format; None if no known format fits.

    Raises:
        ValueError: If there are several.
    """
    first, every = _Holding(records[:1], naming), _Holding(records, naming)
    others = {key: _chosen(naming.get(key), every.filled(*names)) for key, names in OTHERS.items()}
    task = {"task": naming.get("task")}
    if text := _named(naming, TEXT):
        return Format("texts", {TEXT: text, **task})
    messages, pairs = _conversations(naming, first), [] if _named(naming, "messages") else _pairs(naming, first)
    found = [f"messages_field: {field}" for field in messages]
    found += [f"prompt_field: {prompt} and response_field: {response}" for prompt, response in pairs]
    if len(found) > 1:
        raise InvalidInputError(f"there are several fields that may hold the example. Set {', or '.join(found)}.")
    if messages:
        around = {key: others[key] for key in ("system", "tools")}
        return Format("conversations", {"messages": messages[0], **around, **task})
    if pairs:
        return _pair_format(naming, *pairs[0], others, first, every)
    if prompts := _prompts(naming, first):  # the missing response is reported later
        response = PARTNERS.get(prompts[0].lower(), "response")
        return _pair_format(naming, prompts[0], response, others, first, every)
    if naming.get("messages") == AUTO and (empty := first.holds(*CONVERSATIONS)):  # its content is reported later
        return Format("conversations", {"messages": empty[0], **task})
    if naming.get(TEXT) != AUTO or not (texts := first.holds(TEXT)):
        return None
    if answers := first.filled(*RESPONSES):
        text, answer = texts[0], answers[0]
        raise InvalidInputError(
            f"{text!r} may be a text to learn or a question. Set text_field: {text}, or prompt_field: {text} and "
            f"response_field: {answer}."
        )
    return Format("texts", {TEXT: texts[0], **task})


def with_response(record: dict[str, Any], naming: Fields) -> dict[str, Any]:
    """Add an empty response to a record with a prompt only: it can be answered, though not learned.

    Args:
        record: The record; changed in place.
        naming: The field of each column, ``"auto"`` where it is to be recognised.

    Returns:
        The record.

    >>> with_response({"prompt": "Hi"}, {"response": "auto"}), with_response({"prompt": "Hi", "answer": "Hello!"}, {})
    ({'prompt': 'Hi', 'completion': ''}, {'prompt': 'Hi', 'answer': 'Hello!'})
    """
    names = {str(key).lower() for key in dict.keys(record)}
    response, prompt = _named(naming, "response"), _named(naming, "prompt")
    prompts = [name for name in ([prompt.lower()] if prompt else PROMPTS) if name in names]
    answers = [response.lower()] if response else [*RESPONSES, *CONVERSATIONS]
    if prompts and not names.intersection(answers):
        record[response or PARTNERS.get(prompts[0], "response")] = ""
        if reference := _named(naming, "reference"):
            dict.setdefault(record, reference, "")
    return record


def _conversations(naming: Fields, first: _Holding) -> list[str]:
    """Return the fields that may hold the conversation."""
    named = naming.get("messages")
    if named != AUTO:
        return [] if named is None else [named]
    # Preference data need not have a prompt in addition to chats.
    return first.conversations(CONVERSATIONS) or ([] if first.holds(*PROMPTS) else first.conversations(["chosen"]))


def _prompts(naming: Fields, first: _Holding) -> list[str]:
    """Return the fields that may hold the prompt."""
    if named := _named(naming, "prompt"):
        return [named]
    found = first.holds(*PROMPTS) or (first.holds("input") if first.holds(*RESPONSES) else [])
    if not found and _named(naming, "response"):
        return ["instruction"]
    return [field for field in found if field.lower() == "instruction"] or found


def _pairs(naming: Fields, first: _Holding) -> list[tuple[str, str]]:
    """Return the pairs of prompt and response that a record may hold."""
    prompts, named = _prompts(naming, first), _named(naming, "response")
    responses = [named] if named else first.holds(*RESPONSES)
    if not named and "instruction" in (prompt.lower() for prompt in prompts):  # Alpaca's format, whatever else there is
        responses = [field for field in responses if field.lower() == "output"] or responses
    return [(prompt, response) for prompt in prompts for response in responses]


def _pair_format(
    naming: Fields, prompt: str, response: str, others: Fields, first: _Holding, every: _Holding
) -> Format:
    fields: Fields = {"prompt": prompt, "input": naming.get("input"), "response": response}
    if naming.get("input") == AUTO:
        inputs = [field for field in every.holds(*INPUTS) if field not in (prompt, response)]
        fields["input"] = inputs[0] if inputs and _named(naming, "prompt") in (None, "instruction") else None
        if len(inputs) > 1 and fields["input"]:
            raise InvalidInputError(f"it has a further context in {' and '.join(map(repr, inputs))}: set input_field.")
    if any(others.values()) or first.in_turns(prompt, response):
        return Format("conversations", {**fields, **others, "task": naming.get("task")})
    reference = naming.get("reference")
    fields["reference"] = response if reference in (None, AUTO) else reference
    return Format("prompts", {**fields, **{name: naming[name] for name in ("task", "prompt_role") if name in naming}})


class _Holding:
    """The nonempty fields of several records, without fields that have another use."""

    def __init__(self, records: list[dict[str, Any]], naming: Fields) -> None:
        used = {naming.get(column) for column in ("reference", "task", "prompt_role")}
        self.records = records
        self.fields: dict[str, dict[str, None]] = {}  # by their names in lower case
        for record in records:
            for key in dict.keys(record):
                if isinstance(key, str) and key not in used:
                    self.fields.setdefault(key.lower(), {})[key] = None

    def filled(self, *names: str) -> list[str]:
        """Return the given fields that are not empty."""
        return [field for field in self._there(names) if any(is_filled(dict.get(r, field)) for r in self.records)]

    def holds(self, *names: str) -> list[str]:
        """Return the given fields that are not empty or, if all are empty, those that exist."""
        return self.filled(*names) or self._there(names)

    def conversations(self, names: Iterable[str]) -> list[str]:
        """Return the given fields that contain messages."""
        return [field for field in self._there(names) if any(is_conversation(dict.get(r, field)) for r in self.records)]

    def in_turns(self, *fields: str) -> bool:
        """Return whether one of the given fields contains messages, other than as a JSON text."""
        values = [dict.get(record, field) for record in self.records for field in fields]
        return any(is_conversation(value) and not isinstance(value, str) for value in values)

    def _there(self, names: Iterable[str]) -> list[str]:
        return [field for name in names for field in self.fields.get(name, ())]


def is_filled(value: Any) -> bool:
    """Return whether a value is not empty."""
    return value is not None and value not in ("", [], {})


def _chosen(named: str | None, found: list[str]) -> str | None:
    return named if named != AUTO else (found[0] if found else None)


def _named(naming: Fields, column: str) -> str | None:
    return None if naming.get(column) == AUTO else naming.get(column)
