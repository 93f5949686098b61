"""Encoding conversations: the turns to learn, and the truncation of long conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from milora_lightning.data.encoding.chat import ChatTemplate, Message, Span, token_ids
from milora_lightning.data.encoding.conversation import Conversation, Written, shown_text
from milora_lightning.data.encoding.token_borders import Located, locate
from milora_lightning.data.encoding.truncation import common_length, join
from milora_lightning.data.encoding.turns import write_conversation
from milora_lightning.data.reading.values import shown
from milora_lightning.utils.errors import InvalidInputError

TrainOn = str | list[str]
ASSISTANT, LAST = "assistant", "last"
LOSS_FIELDS = ("weight", "loss", "train", "training")  # fields of a message that determine whether it is learned


class EncodedConversation(NamedTuple):
    """Token ids of a conversation.

    Attributes:
        ids: The ids.
        spans: Spans of the ids to learn.
        prompt_length: Number of ids before the assistant's last turn.
        prompt: The text of these ids, including special tokens.
        instruction: The messages before that turn, without template.
        reference: The assistant's text in that turn.
        truncated: Whether a part was dropped because of the length.
        unlearned: Number of turns not learned because the template writes them differently once others follow.
    """

    ids: list[int]
    spans: list[Span]
    prompt_length: int
    prompt: str
    instruction: str
    reference: str
    truncated: bool
    unlearned: int

    def asked(self) -> EncodedConversation:
        """Return the conversation without the assistant's last turn, as a prompt to answer."""
        length = self.prompt_length
        return self._replace(ids=self.ids[:length], spans=[Span(length, length)], reference="", unlearned=0)


def choose_turns(messages: Any, tools: Any, train_on: TrainOn = ASSISTANT) -> Conversation:
    """Read the columns ``messages`` and ``tools`` of a row.

    Args:
        messages: A list of messages, or its JSON text.
        tools: A list of functions, or its JSON text; may be empty.
        train_on: ``"assistant"`` for all turns of the assistant, ``"last"`` for its last turn, or a list of roles. A
            field ``weight``, ``loss`` or ``train`` (0 or 1, false or true) in a message decides for that message.

    Raises:
        ValueError: If they are not messages, or such a field is neither true nor false.
    """
    messages, tools = (_parsed(value, name) for value, name in ((messages, "messages"), (tools, "tools")))
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidInputError(f"message {i} is {shown(message)}, but has to be an object with role and content.")
    roles = [message["role"] for message in messages]
    if train_on == LAST:
        chosen = {max((i for i, role in enumerate(roles) if role == ASSISTANT), default=-1)}
    else:
        wanted = [train_on] if isinstance(train_on, str) else train_on
        chosen = {i for i, role in enumerate(roles) if role in wanted}
    flags = [_loss_flag(message, i) for i, message in enumerate(messages, 1)]
    learned = [i in chosen if flag is None else flag for i, flag in enumerate(flags)]
    return Conversation(messages, learned, tools or None)


def check_roles(conversation: Conversation, template: str) -> None:
    """Check that a prompt template can write every message.

    Raises:
        ValueError: If it cannot: it supports questions, answers, and a system message before a question.
    """
    roles = [message["role"] for message in conversation.messages]
    misplaced = [
        role
        for role, following in zip(roles, [*roles[1:], ""], strict=True)
        if role not in ("system", "user", ASSISTANT) or (role == "system" and following != "user")
    ]
    if misplaced or conversation.tools or any(message.get("tool_calls") for message in conversation.messages):
        what = f"a message of the role {misplaced[0]!r} there" if misplaced else "tools"
        raise InvalidInputError(
            f"the conversation goes {roles}, but template={template!r} has no place for {what}. Use template='chat' "
            "with a tokenizer that has a chat template, or a Jinja file."
        )


def encode_conversation(
    conversation: Conversation,
    template: ChatTemplate,
    max_length: int,
    prefill: str = "",
    written: Written | None = None,
    located: Located | None = None,
) -> EncodedConversation | None:
    """Tokenize a conversation.

    A conversation that is too long loses everything after its last turn to learn, then as many of its earliest
    exchanges (a user message and its replies) as necessary; system message and tools are kept. If the last exchange is
    too long by itself, its prompt loses its beginning, and an answer that is still too long its end.

    Args:
        conversation: The conversation.
        template: The chat template.
        max_length: Maximum number of tokens.
        prefill: Text that every answer starts with; it belongs to the prompt.
        written: The result of :func:`milora_lightning.data.encoding.turns.write_conversation`, if it is available.
        located: Its token ids and the borders in them, if they are available.

    Returns:
        The token ids; None if nothing in the conversation is learned.

    Raises:
        ChatTemplateError: As for :func:`milora_lightning.data.encoding.turns.write_conversation`.
    """
    if not any(conversation.learned):
        return None
    written = written or write_conversation(conversation, template, prefill)
    encoded = _tokenized(written, conversation, template, located)
    if len(encoded.ids) <= max_length:
        return encoded if encoded.spans else None
    conversation = conversation.until(max(i for i, learn in enumerate(conversation.learned) if learn) + 1)

    def shortened(exchanges: int) -> EncodedConversation:
        part = conversation.without(exchanges)
        return _tokenized(write_conversation(part, template, prefill), part, template)

    # Binary search: the length decreases with every exchange that is dropped.
    low, high = 0, max(0, conversation.exchanges() - 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(shortened(middle).ids) <= max_length else (middle + 1, high)
    encoded = shortened(low)
    if len(encoded.ids) > max_length:
        encoded = _cut(encoded, conversation.without(low), template.tokenizer, max_length)
    return encoded._replace(truncated=True) if encoded.spans else None


def _tokenized(
    written: Written, conversation: Conversation, template: ChatTemplate, located: Located | None = None
) -> EncodedConversation:
    tokenizer = template.tokenizer
    answer = written.answer
    borders = written.borders()
    ids, counts = located or locate(written.text, borders, tokenizer)
    tokens = dict(zip(borders, counts, strict=True))
    if template.end_of_turn is None and answer is not None and answer.stop == len(written.text):
        ids = [*ids, cast(int, tokenizer.eos_token_id)]
        tokens[answer.stop] = len(ids)
    spans = [Span(tokens[turn.start], tokens[turn.stop]) for turn in written.turns]
    last = conversation.last(ASSISTANT)
    if answer is None or last is None:  # no turn of the assistant is learned
        return EncodedConversation(ids, spans, len(ids), written.text, "", "", False, written.unlearned)
    end = "" if template.end_of_turn is None else str(tokenizer.convert_ids_to_tokens(template.end_of_turn))
    said = shown_text(conversation.messages[last]) or written.text[answer.start : answer.stop].removesuffix(end).strip()
    before = "\n".join(filter(None, map(shown_text, conversation.messages[:last])))
    prompt = written.text[: answer.start]
    return EncodedConversation(ids, spans, tokens[answer.start], prompt, before, said, False, written.unlearned)


def _cut(
    encoded: EncodedConversation, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedConversation:
    """Truncate a single exchange, keeping the template's text before the question."""
    if not encoded.spans:
        return encoded
    start, stop = encoded.spans[-1]
    user = conversation.last("user")
    asked = shown_text(conversation.messages[user]).strip() if user is not None else ""
    position = encoded.prompt.rfind(asked) if asked else 0
    head = common_length(token_ids([encoded.prompt[: max(position, 0)]], tokenizer)[0], encoded.ids[:start])
    ids, length = join(encoded.ids[:start], encoded.ids[start:stop], max_length, tokenizer.bos_token_id, head)
    return encoded._replace(ids=ids, spans=[Span(length, len(ids))], prompt_length=length)


def _parsed(value: Any, name: str) -> list[Any]:
    """Read a list from its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError as error:
            raise InvalidInputError(f"{name!r} holds {shown(value)}, which is not JSON ({error}).") from error
    if not isinstance(value, Sequence):
        raise InvalidInputError(f"{name!r} holds {shown(value)} ({type(value).__name__}), but has to be a list.")
    return list(value)


def _loss_flag(message: Message, number: int) -> bool | None:
    """Return whether a message is learned according to its fields; None if they do not say."""
    given = {name: message[name] for name in LOSS_FIELDS if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise InvalidInputError(
                f"message {number} has {name}={value!r}, but a message is learned or not: give 0 or 1, false or true."
            )
    choices = {bool(value) for value in given.values()}
    if len(choices) > 1:
        raise InvalidInputError(
            f"message {number} has {given}, which contradict each other about whether to learn it. Keep one."
        )
    return choices.pop() if choices else None
