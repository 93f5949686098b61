"""Converting messages to the form that a chat template expects."""

from __future__ import annotations

import json
from collections.abc import Sequence

from milora_lightning.data.encoding.chat import ChatTemplate, ChatTemplateError, Message, fold_system, write


def prepared(messages: Sequence[Message], template: ChatTemplate, prefill: str) -> list[Message]:
    """Convert messages to the form that a template expects.

    Args:
        messages: The messages of a conversation.
        template: The template; a system message that it does not take is put before the first question.
        prefill: Text that every answer begins with.
    """
    taken = list(messages) if template.takes_system else fold_system(messages)
    taken = [
        {**m, "content": prefill + m["content"]}
        if prefill and m["role"] == "assistant" and isinstance(m.get("content"), str)
        else m
        for m in taken
    ]
    parsed = [_with_parsed_arguments(message) for message in taken]
    if parsed != taken:
        try:
            write(parsed, template.tokenizer, False)
        except ChatTemplateError:  # the template concatenates the arguments as text
            return taken
    return parsed


def _with_parsed_arguments(message: Message) -> Message:
    """Parse the arguments of tool calls from the API's JSON text into objects, as servers do and templates expect."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    parsed = []
    for call in calls:
        function = call.get("function", call)
        try:
            arguments = json.loads(function["arguments"])
        except (KeyError, TypeError, ValueError):
            arguments = function.get("arguments")
        if isinstance(arguments, dict):
            function = {**function, "arguments": arguments}
        parsed.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": parsed}
