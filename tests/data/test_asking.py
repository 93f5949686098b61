"""Prompts for generation: what a template has no place for is asked otherwise, or refused."""

from __future__ import annotations

import pytest
from helpers.chat_templates import GEMMA, MISTRAL, chat_tokenizer
from helpers.chats import ids_of
from helpers.conversations import SYSTEM, TOOL, user

from milora_lightning.data.encoding.asking import NotAskableError, prompt_ids

WITH_TOOLS = "{% if tools %}{{ 'Tools: ' + tools | tojson }}{% endif %}"


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("template", [MISTRAL, GEMMA])  # the first leaves system messages out, the second refuses them
def test_a_system_message_without_a_place_comes_before_the_first_question(template: str, tools: list | None) -> None:
    tokenizer = chat_tokenizer(WITH_TOOLS + template)
    want = ids_of(tokenizer, [user("Be kind.\n\nHi")], tools=tools, add_generation_prompt=True)
    assert prompt_ids([SYSTEM, user()], tokenizer, tools) == want
    assert (want == ids_of(tokenizer, [user("Be kind.\n\nHi")], add_generation_prompt=True)) == (tools is None)


@pytest.mark.parametrize("template", [MISTRAL, GEMMA])
def test_tools_without_a_place_are_refused(template: str) -> None:
    with pytest.raises(NotAskableError, match="leaves out the tools"):
        prompt_ids([SYSTEM, user()], chat_tokenizer(template), [TOOL])
