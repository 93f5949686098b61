"""The prompts for ``generate``: lines of text, or rows in the formats of training data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from milora_lightning.data.encoding.asking import messages_for
from milora_lightning.data.encoding.chat import Message
from milora_lightning.data.reading.conversations import read_conversation, read_tools
from milora_lightning.data.reading.formats import CONVERSATIONS, INPUTS, OTHERS, is_filled
from milora_lightning.data.reading.opening import kind_of, open_text
from milora_lightning.data.reading.records import is_data_file, read_records
from milora_lightning.data.reading.values import as_text
from milora_lightning.utils.errors import InvalidInputError, MissingFileError

PROMPTS = ("prompt", "instruction", "question", "query", "problem")
"""Fields of a row that may contain the prompt, case-insensitively; the first one present is used."""


def read_prompts(name: str) -> Iterator[dict[str, Any]]:
    """Read the prompts of a file, or of standard input.

    Args:
        name: A data file in a format of ``fit`` other than plain text; or another file or ``-`` with a prompt in each
            line, JSON lines, or a JSON array of objects.

    Yields:
        Rows, with a ``prompt`` for a line of text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no prompt, or a line is not a JSON object although the first one is.
    """
    path = Path(name).expanduser()
    number = 0
    if name != "-" and not path.is_file():
        raise MissingFileError(f"There is no file {name!r} of prompts. Check the path.")
    if name != "-" and is_data_file(path) and kind_of(path) != ".txt":
        for number, row in read_records(str(path)):  # noqa: B007
            yield row if isinstance(row, dict) else {"prompt": row}
    else:
        for number, row in enumerate(_rows_of_text(_read(name, path), name), 1):  # noqa: B007
            yield row
    if number == 0:
        raise InvalidInputError(f"There are no prompts in {_shown(name)}.")


def _read(name: str, path: Path) -> str:
    if name != "-":
        with open_text(str(path)) as file:
            return file.read()
    try:
        text = sys.stdin.read()
        text.encode()  # half characters stand for bytes that are no UTF-8 where the locale is C
    except UnicodeError as error:
        raise InvalidInputError(f"{_shown(name)} is no text in UTF-8 ({error}). Convert it.") from error
    return text


def _rows_of_text(text: str, name: str) -> Iterator[dict[str, Any]]:
    array = _parsed(text) if text.lstrip()[:1] == "[" else None
    if isinstance(array, list) and array and all(isinstance(row, dict) for row in array):
        yield from array
        return
    # Not splitlines, which also splits at characters that JSON and texts may contain.
    lines = [line for line in text.split("\n") if line.strip()]
    as_json = bool(lines) and isinstance(_parsed(lines[0]), dict)
    for number, line in enumerate(lines, 1):
        row = _parsed(line) if as_json else {"prompt": line.removesuffix("\r")}
        if not isinstance(row, dict):
            raise InvalidInputError(
                f"Line {number} of {_shown(name)} is no JSON object, as the first is: {line[:60]!r}."
            )
        yield row


def conversation(row: dict[str, Any], system: str, tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """Return the conversation of a row that is to be continued.

    Args:
        row: A row with ``messages`` or ``conversations``, without its last answer, or with one of ``PROMPTS`` and
            optionally ``input``; optionally with ``system``.
        system: System message if the row has none; may be empty.
        tokenizer: The tokenizer that formats the messages.

    Raises:
        ValueError: If there is nothing to ask.

    >>> row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    >>> conversation(row, "", None)
    [{'role': 'user', 'content': 'Hi'}]
    """
    if field := _field(row, OTHERS["system"]):
        system = as_text(row[field], f"the field {field!r}")
    if field := _field(row, CONVERSATIONS):
        messages = read_conversation(row[field], field)
        last = max((i for i, m in enumerate(messages) if m["role"] != "assistant"), default=-1)
        if last < 0:
            raise InvalidInputError("its messages are none but the assistant's.")
        has_system = messages[0]["role"] == "system"
        return [*([{"role": "system", "content": system}] if system and not has_system else []), *messages[: last + 1]]
    field = _field(row, PROMPTS)
    if field is None:
        raise InvalidInputError(f"it has none of the fields {', '.join(PROMPTS)} and messages, only {sorted(row)}.")
    context = _field(row, INPUTS)
    further = as_text(row[context], f"the field {context!r}") if context else ""
    return messages_for(as_text(row[field], f"the field {field!r}"), further, system, tokenizer)


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools of a row (descriptions of functions); None if it has none."""
    field = _field(row, OTHERS["tools"])
    written = read_tools(row[field], field) if field else ""
    return json.loads(written) if written else None


def _field(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the first of several fields that is not empty."""
    filled = {key.lower(): key for key in row if is_filled(row[key])}
    return next((filled[name] for name in names if name in filled), None)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _shown(name: str) -> str:
    return "standard input" if name == "-" else name
