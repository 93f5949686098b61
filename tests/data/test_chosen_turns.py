"""Which turns of a conversation are learned: by role, the last of the assistant's, or as their own fields say."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.chat_templates import chat_tokenizer
from helpers.conversations import LONG

from milora_lightning.data.encoding.chat import ChatTemplate
from milora_lightning.data.encoding.turn_encoding import choose_turns, encode_conversation


def talk(*roles: str, **fields: Any) -> list[dict[str, Any]]:
    """Messages of these roles; the second has fields of its own."""
    messages: list[dict[str, Any]] = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    messages[1].update(fields)
    return messages


ROLES = ("user", "assistant", "user", "assistant", "tool", "user")


@pytest.mark.parametrize(
    ("train_on", "fields", "learned"),
    [
        ("assistant", {}, [1, 3]),
        ("last", {}, [3]),  # though others follow it
        (["assistant", "tool"], {}, [1, 3, 4]),
        ("assistant", {"weight": 0}, [3]),
        ("last", {"weight": 1}, [1, 3]),
        ("last", {"train": True}, [1, 3]),
        ("assistant", {"training": 0}, [3]),
        ("assistant", {"loss": False, "training": 0}, [3]),
        ("assistant", {"weight": None}, [1, 3]),
    ],
)
def test_turns_are_learned_by_role_unless_a_field_says_otherwise(
    train_on: Any, fields: dict[str, Any], learned: list[int]
) -> None:
    conversation = choose_turns(talk(*ROLES, **fields), "", train_on)
    assert [i for i, learns in enumerate(conversation.learned) if learns] == learned


def test_without_a_turn_of_the_assistants_there_is_no_last_one() -> None:
    assert choose_turns(talk("user", "user"), "", "last").learned == [False, False]


def test_no_more_is_dropped_than_the_length_asks_for_to_the_token() -> None:
    template, conversation = ChatTemplate.of(chat_tokenizer("qwen")), choose_turns(LONG, "")

    def length(most: int) -> int:
        encoded = encode_conversation(conversation, template, most)
        assert encoded is not None
        return len(encoded.ids)

    fits = length(10**6)
    for _ in range(4):
        assert length(fits) == fits
        less = length(fits - 1)
        assert less < fits - 1  # an exchange is dropped as a whole
        fits = less
