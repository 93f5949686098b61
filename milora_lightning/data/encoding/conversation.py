"""Conversations: their messages, which of them are learned, and the position of turns in the formatted text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from milora_lightning.data.encoding.chat import Message


@dataclass(frozen=True)
class Conversation:
    """Messages in the form of OpenAI's API.

    Args:
        messages: Each with ``role``, and ``content``, ``tool_calls`` or both.
        learned: For each message, whether its text is learned.
        tools: Descriptions of functions that the model may call.
    """

    messages: Sequence[Message]
    learned: Sequence[bool]
    tools: Sequence[dict[str, Any]] | None = None

    def last(self, role: str) -> int | None:
        """Return the index of the last message of a role; None if there is none."""
        return max((i for i, message in enumerate(self.messages) if message["role"] == role), default=None)

    def until(self, stop: int) -> Conversation:
        """Return the first messages."""
        return replace(self, messages=self.messages[:stop], learned=self.learned[:stop])

    def without(self, exchanges: int) -> Conversation:
        """Drop the earliest exchanges, each from a user message to the next one; a system message stays."""
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not exchanges:
            return self
        kept = [*range(users[0]), *range(users[exchanges], len(self.messages))]
        return replace(self, messages=[self.messages[i] for i in kept], learned=[bool(self.learned[i]) for i in kept])

    @property
    def asks(self) -> bool:
        """Whether it ends where the assistant should answer."""
        return bool(self.messages) and self.messages[-1]["role"] not in ("assistant", "system")

    def answered(self) -> Conversation:
        """Append a dummy answer as the only turn to learn, which shows where the prompt ends."""
        answer = {"role": "assistant", "content": "An answer."}
        return replace(self, messages=[*self.messages, answer], learned=[*[False] * len(self.messages), True])

    def exchanges(self) -> int:
        """Count the user's messages."""
        return sum(message["role"] == "user" for message in self.messages)


class Turn(NamedTuple):
    """The range of a message's text in a formatted conversation, in characters, including its end of turn."""

    message: int
    start: int
    stop: int


class Written(NamedTuple):
    """A conversation as formatted by its template.

    Attributes:
        text: The whole text, with all special tokens.
        turns: The turns to learn, in order.
        answer: The assistant's last turn whose prompt has a definite end; None if there is none.
        unlearned: Number of turns that should be learned, but are formatted differently in the whole text than the
            model would have to generate them.
    """

    text: str
    turns: list[Turn]
    answer: Turn | None
    unlearned: int

    def borders(self) -> list[int]:
        """Return where turns begin and end, in characters, in ascending order."""
        turns = [*self.turns, *([self.answer] if self.answer else [])]
        return sorted({border for turn in turns for border in (turn.start, turn.stop)})


def shown_text(message: Message) -> str:
    """Return a message's text: its content, or the texts in it if it is a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)
    return content if isinstance(content, str) else "" if content is None else json.dumps(content)
