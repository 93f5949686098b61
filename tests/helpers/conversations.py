"""What the tests of conversations share."""

from __future__ import annotations

from typing import Any

Messages = list[dict[str, Any]]


SYSTEM = {"role": "system", "content": "Be kind."}


def user(content: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str | None = "Hello!", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TALK = [SYSTEM, user(), assistant(), user("What is\n1 + 2?"), assistant("It is 3.")]


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}


def with_calls(arguments: Any) -> Messages:
    result = {"role": "tool", "tool_call_id": "1", "name": "add", "content": '{"sum": 3}'}
    return [user("1 + 2?"), assistant(None, tool_calls=[call(arguments)]), result, assistant("It is 3.")]


LONG = [SYSTEM, *(m for k in range(8) for m in (user(f"question {k} " + "word " * 9), assistant(f"answer {k}")))]
