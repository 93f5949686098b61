"""Conversion of conversations (OpenAI's `messages`, ShareGPT's `conversations`) into messages of a single form."""

from __future__ import annotations

import json
from typing import Any

from milora_lightning.data.reading.values import as_text, question, shown
from milora_lightning.utils.errors import InvalidInputError

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "tool_call"),  # an assistant's message that is just a call
    **{role: role for role in ("system", "developer", "ipython")},
}
TURNS = {"prompt": "user", "response": "assistant"}
FORM = "a list of messages, each with role and content, or from and value"


def is_conversation(value: Any) -> bool:
    """Return whether a value looks like messages, or like a JSON text with messages."""
    if isinstance(value, str):
        return value.lstrip()[:1] == "["
    if isinstance(value, dict):
        return len(_by_message(value)) > 0
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def read_conversation(value: Any, field: str) -> list[Message]:
    """Read a conversation.

    Args:
        value: Messages with ``role`` and ``content``, or with ``from`` and ``value``; or a text in JSON that holds
            them, as in CSV files.
        field: Name of the field, for error messages.

    Returns:
        The messages in OpenAI's form. Contents are texts; arguments of tool calls are objects, which chat templates
        write as JSON; all other fields of a message are kept.

    Raises:
        ValueError: If it is something else.

    >>> read_conversation([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "conversations")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    """
    if isinstance(value, str):
        value = _parsed(value, f"{field!r}")
    if isinstance(value, dict):
        value = _by_message(value) or value
    if not isinstance(value, list) or not value:
        raise InvalidInputError(f"{field!r} holds {shown(value)} ({type(value).__name__}), but has to be {FORM}.")
    return [_message(message, f"message {i} of {field!r}") for i, message in enumerate(value, 1)]


def _by_message(value: dict[str, Any]) -> list[Message]:
    """Convert an object of lists, as ``datasets`` stores lists of objects, back to messages; any other object gives [].

    >>> _by_message({"role": ["user"], "content": ["Hi"]})
    [{'role': 'user', 'content': 'Hi'}]
    """
    columns = list(value.values())
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return []
    return [dict(zip(value, parts, strict=True)) for parts in zip(*columns, strict=True)]


def conversation_of(record: dict[str, Any], fields: dict[str, str | None]) -> list[Message]:
    """Convert a record to a conversation.

    Args:
        record: The record.
        fields: The field of the ``messages``; or those of ``prompt`` and ``response``, each a text or messages, with
            ``input`` and ``history`` (earlier pairs of question and answer). In both cases also that of the ``system``
            message.

    Raises:
        ValueError: If one of them is something else.
    """
    if field := fields.get("messages"):
        messages = read_conversation(record.get(field), field)
    else:
        asked, answered = (_turn(record, str(fields[part]), role) for part, role in TURNS.items())
        if (field := fields.get("input")) and (context := _optional(record, field)):
            asked[-1]["content"] = question(asked[-1]["content"], context)
        history = _history(record, fields.get("history"))
        # The response may be the whole conversation, including the prompt, as in preference data.
        messages = answered if answered[0]["role"] != "assistant" else [*history, *asked, *answered]
    if (field := fields.get("system")) and (text := _optional(record, field)):
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
        if messages[0]["content"] != text:
            raise InvalidInputError(
                f"there are two system messages, one in {field!r}. Remove one, or set system_field: null."
            )
    return messages


def _turn(record: dict[str, Any], field: str, role: str) -> list[Message]:
    if field not in record:
        raise InvalidInputError(f"there is no field {field!r}, only {sorted(map(str, record))}. Correct the row.")
    value = record[field]
    if is_conversation(value) and not isinstance(value, str):
        return read_conversation(value, field)
    return [{"role": role, "content": as_text(value, f"the field {field!r}")}]


def _history(record: dict[str, Any], field: str | None) -> list[Message]:
    turns = (record.get(field) if field else None) or []
    if isinstance(turns, str):
        turns = _parsed(turns, f"{field!r}")
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise InvalidInputError(
            f"{field!r} holds {shown(turns)}, but has to be a list of pairs of a question and its answer."
        )
    texts = [
        (as_text(text, f"a turn of {field!r}"), role)
        for turn in turns
        for text, role in zip(turn, TURNS.values(), strict=True)
    ]
    return [{"role": role, "content": text} for text, role in texts]


def _optional(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    return "" if value is None else as_text(value, f"the field {field!r}")


def as_json(value: Any, what: str) -> str:
    """Write messages or tools as JSON.

    Raises:
        ValueError: If they contain something that JSON cannot represent.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{what} cannot be written as JSON ({error}). Correct or remove the row.") from error
    return as_text(text, what)


def read_tools(value: Any, field: str) -> str:
    """Read the tools of a conversation, a list or a text in JSON that holds one.

    Args:
        value: Tools as chat templates expect them, or bare functions, as in OpenAI's older ``functions``.
        field: Name of the field, for error messages.

    Returns:
        The tools as JSON; empty if there are none.

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(value, str):
        value = _parsed(value, f"{field!r}") if value.strip() else None
    if value is None or value == []:
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InvalidInputError(
            f"{field!r} holds {shown(value)} ({type(value).__name__}), but has to be a list of tools."
        )
    return as_json([_tool(tool) for tool in value], f"{field!r}")


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Convert a bare function to the form that chat templates expect."""
    return {"type": "function", "function": tool} if isinstance(tool.get("name"), str) and "type" not in tool else tool


def _message(message: Any, what: str) -> Message:
    if not isinstance(message, dict):
        raise InvalidInputError(
            f"{what} is {shown(message)} ({type(message).__name__}), but has to have role and content."
        )
    # Tables have every field in each message.
    message = {key: value for key, value in message.items() if value is not None}
    speaker = next((key for key in ("role", "from") if key in message), None)
    body = next((key for key in ("content", "value") if key in message), None)
    calls = [key for key in ("tool_calls", "function_call") if message.get(key)]
    missing = [name for name, key in (("role", speaker), ("content", body or calls)) if not key]
    if speaker is None or missing:
        raise InvalidInputError(f"{what} has no {' and no '.join(missing)}, only {sorted(map(str, message))}.")
    written = as_text(message.pop(speaker), f"the role of {what}")
    role = ROLES.get(written.strip().lower())
    if role is None:
        raise InvalidInputError(f"the role of {what} is {written!r:.80}, but has to be one of {', '.join(ROLES)}.")
    content = _content(message.pop(body), f"the content of {what}") if body else ""
    if role == "tool_call":
        calls_read = [_call(call, what) for call in _listed(_parsed(content, f"the content of {what}"))]
        return {"role": "assistant", "content": "", "tool_calls": calls_read, **message}
    if "tool_calls" in message:
        message["tool_calls"] = [_call(call, what) for call in _listed(message["tool_calls"])]
    if "function_call" in message:  # OpenAI's older form of one call
        message["tool_calls"] = [_call(message.pop("function_call"), what)]
    return {"role": role, "content": content, **message}


def _content(value: Any, what: str) -> str:
    """Return a message's text, which may be in parts."""
    if not isinstance(value, list):
        return as_text(value, what)
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or part.get("text") is None:
            raise InvalidInputError(f"{what} has the part {shown(part)}, which is no text. Correct or remove the row.")
        parts.append(as_text(part["text"], what))
    return "".join(parts)


def _call(call: Any, what: str) -> dict[str, Any]:
    """Convert a call to the form that chat templates expect, with the arguments as an object."""
    if isinstance(call, dict):
        call = {key: value for key, value in call.items() if value is not None}
        function = dict(call["function"]) if isinstance(call.get("function"), dict) else call
        if isinstance(function.get("name"), str):
            arguments = function.get("arguments", function.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = _parsed(arguments, f"the arguments of a call in {what}") if arguments.strip() else {}
            outside = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
            outside.pop("parameters", None)
            return {"type": "function", **outside, "function": {"name": function["name"], "arguments": arguments}}
    raise InvalidInputError(f"a call in {what} is {shown(call)}, but has to have a name and arguments.")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"{what} holds {shown(text)}, which is not valid JSON ({error}). Correct it."
        ) from error
