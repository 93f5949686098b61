"""Multi-turn conversations formatted with a chat template, and the positions of the turns to learn in the text."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any, cast

from transformers.utils.chat_template_utils import render_jinja_template

from milora_lightning.data.encoding.chat import ChatTemplate, ChatTemplateError, Message, check_prefix, dense, write
from milora_lightning.data.encoding.conversation import Conversation, Turn, Written, shown_text
from milora_lightning.data.encoding.prepared_messages import prepared

PROBE = "milora content probe"  # in no template
REASONING = ("reasoning_content", "reasoning", "thinking")  # where messages hold an assistant's thoughts
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def write_conversation(conversation: Conversation, template: ChatTemplate, prefill: str = "") -> Written:
    """Format a conversation, and find the turns to learn in it.

    If the template marks what the model generates (``{% generation %}``), its marks are used. Otherwise, a turn of the
    assistant begins where the conversation before it, with the generation prompt, ends, and extends to the end of turn.
    This requires that the whole text begins with the conversation up to the turn. Templates that drop earlier thoughts
    write most turns differently once others follow. Such a turn is not what the model would have to generate, so only
    the last turn is learned then.

    Args:
        conversation: The conversation.
        template: The chat template.
        prefill: Text that every turn of the assistant starts with; it belongs to the prompt.

    Raises:
        ChatTemplateError: If the template refuses the conversation, leaves out a part of it, or begins the last answer
            differently than for generation.
    """
    messages = prepared(conversation.messages, template, prefill)
    offset = len(conversation.messages) - len(messages)  # a folded system message
    learned = list(conversation.learned)[offset:]
    if offset and conversation.learned[0]:
        learned[0] = True
    pen = _Pen(messages, learned, conversation.tools, template, prefill)
    return pen.written()


class _Pen:
    """Formats one conversation, as a whole and in parts."""

    def __init__(
        self,
        messages: list[Message],
        learned: list[bool],
        tools: Sequence[dict[str, Any]] | None,
        template: ChatTemplate,
        prefill: str,
    ) -> None:
        self.template, self.prefill = template, prefill
        self.tokenizer = template.tokenizer
        self.messages, self.learned = messages, learned
        self.tools = list(tools) if tools else None
        self.name = f"the chat template of {self.tokenizer.name_or_path!r}"
        self._beginnings: dict[tuple[int, bool], str] = {}
        self.whole = self.beginning(len(messages))

    def beginning(self, stop: int, generates: bool = False) -> str:
        """Format the first messages, once."""
        if (stop, generates) not in self._beginnings:
            self._beginnings[stop, generates] = self.write(self.messages[:stop], generates)
        return self._beginnings[stop, generates]

    def write(self, messages: list[Message], generates: bool = False) -> str:
        return write(messages, self.tokenizer, generates, self.tools)

    def written(self) -> Written:
        """Format the conversation, up to the last turn to learn if that can be learned only without later messages."""
        self._check_nothing_is_left_out()
        marked = self._marked()
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if answers and not marked and (last := answers[-1]) < len(self.messages) - 1 and self._turn(last) is None:
            self.messages, self.learned = self.messages[: last + 1], self.learned[: last + 1]
            self.whole = self.beginning(last + 1)
        if answers and answers[-1] and not marked:
            self._check_asks_alike(answers[-1])
        turns, unlearned = [], 0
        for i, learn in enumerate(self.learned):
            if learn:
                turn = marked.get(i) or self._turn(i)
                turns += [] if turn is None else [turn]
                unlearned += turn is None
        answer = (self._turn(answers[-1]) or marked.get(answers[-1])) if answers else None
        for turn in turns:
            self._check_says(turn)
        return Written(self.whole, turns, answer, unlearned)

    def _turn(self, i: int) -> Turn | None:
        """Find a message in the whole text; None if it is formatted differently than without later messages."""
        if self.messages[i]["role"] != "assistant" or i == 0:  # a greeting at the beginning answers no prompt
            return self._content(i)
        until, prompt = self.beginning(i + 1), self.beginning(i, True) + self.prefill
        stop = self._end_of_turn(until, len(prompt))
        if until.startswith(prompt) and self.whole.startswith(until[:stop]):
            return Turn(i, len(prompt), stop)
        return None

    def _content(self, i: int) -> Turn:
        """Find the text of a message that is not the assistant's, by replacing it with another text."""
        text = shown_text(self.messages[i]).strip()
        other = self.write([*self.messages[:i], {**self.messages[i], "content": PROBE}, *self.messages[i + 1 :]])
        start = other.find(PROBE)
        start += len(self.whole[start:]) - len(self.whole[start:].lstrip())
        if start < 0 or not text or not self.whole.startswith(text, start):
            raise ChatTemplateError(
                f"{self.name} does not write message {i + 1} as it is, so that it cannot be learned. Leave the role "
                f"{self.messages[i]['role']!r} out of train_on."
            )
        stop = start + len(text)
        end = self._end()
        after = self.whole[stop:].lstrip()
        if end and after.startswith(end):
            stop = len(self.whole) - len(after) + len(end)
        return Turn(i, start, stop)

    def _marked(self) -> dict[int, Turn]:
        """Return the turns that the template itself marks; none if it has no marks."""
        jinja = cast(str, self.tokenizer.get_chat_template(None, self.tools))
        if not _MARKS.search(jinja):
            return {}
        _, marks = cast(
            "tuple[Any, list[list[tuple[int, int]]]]",
            render_jinja_template(
                [[{k: v for k, v in message.items() if v is not None} for message in self.messages]],
                tools=self.tools,
                chat_template=jinja,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            ),
        )
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if len(marks[0]) != len(answers):
            raise ChatTemplateError(
                f"{self.name} marks {len(marks[0])} passages as generated, of a conversation of {len(answers)} turns "
                "of the assistant. Put {% generation %} and {% endgeneration %} around each of them, or take them out."
            )
        end = self._end()
        turns = {}
        for i, (start, stop) in zip(answers, marks[0], strict=True):
            start += len(self.prefill) * self.whole.startswith(self.prefill, start)
            if end and not self.whole[start:stop].rstrip().endswith(end) and self.whole.startswith(end, stop):
                stop += len(end)  # otherwise the model would not learn to stop
            turns[i] = Turn(i, start, stop)
        return turns

    def _end(self) -> str | None:
        end = self.template.end_of_turn
        return None if end is None else cast(str, self.tokenizer.convert_ids_to_tokens(end))

    def _end_of_turn(self, text: str, start: int) -> int:
        """Return the end of a text's last turn, which begins at ``start``."""
        end = self._end()
        if end is None:
            return len(text)
        if (position := text.rfind(end, start)) >= 0:
            return position + len(end)
        others = (str(token) for token in self.tokenizer.all_special_tokens)  # a call may end differently
        ends = (text.rfind(other, start) + len(other) for other in others if other in text[start:])
        return max(ends, default=len(text))

    def _check_asks_alike(self, i: int) -> None:
        prompt = self.beginning(i, True) + self.prefill
        check_prefix(prompt, self.beginning(i + 1), self.tokenizer, self.prefill)

    def _check_says(self, turn: Turn) -> None:
        """Check that a turn contains all of its message."""
        message, text = self.messages[turn.message], self.whole[turn.start : turn.stop]
        content = shown_text(message).removeprefix(self.prefill if message["role"] == "assistant" else "")
        for said in (content, *(str(message[field]) for field in REASONING if message.get(field))):
            if dense(said) not in dense(text):
                raise ChatTemplateError(
                    f"{self.name} does not write message {turn.message + 1} as it is: {said!r:.80} has become "
                    f"{text!r:.80}. Bring the message into the form that the template expects, or use another template."
                )

    def _check_nothing_is_left_out(self) -> None:
        """Check that the text contains every message except earlier thoughts, every call, and the tools."""
        text = dense(self.whole)
        for i, message in enumerate(self.messages):
            said = shown_text(message)
            if message["role"] != "assistant" and dense(said) not in text and self._ignores(i, content=PROBE):
                self._refuse_left_out(f"what message {i + 1} of the role {message['role']!r} says")
            for k, call in enumerate(message.get("tool_calls") or []):
                if dense(_name(call)) not in text or self._ignores_call(i, k):
                    self._refuse_left_out(f"the tool calls of message {i + 1}")
        if self.tools and write(self.messages, self.tokenizer, False) == self.whole:
            self._refuse_left_out("the tools")

    def _ignores(self, i: int, **changes: Any) -> bool:
        return self.write([*self.messages[:i], {**self.messages[i], **changes}, *self.messages[i + 1 :]]) == self.whole

    def _ignores_call(self, i: int, k: int) -> bool:
        """Return whether the text omits the function of a call or its arguments.

        That the text contains the function's name proves nothing, because it is also among the tools.
        """
        calls = list(self.messages[i]["tool_calls"])
        call, function = calls[k], calls[k].get("function", calls[k])
        changes: list[dict[str, Any]] = [{"name": PROBE}]
        if function.get("arguments") and isinstance(function["arguments"], dict):
            changes.append({"arguments": {PROBE: PROBE}})
        for change in changes:
            other = {**function, **change}
            calls[k] = {**call, "function": other} if "function" in call else other
            with contextlib.suppress(ChatTemplateError):  # so it is read
                if self._ignores(i, tool_calls=calls):
                    return True
        return False

    def _refuse_left_out(self, what: str) -> None:
        raise ChatTemplateError(
            f"{self.name} leaves out {what}. Use a template that writes it (template: a Jinja file), or take it out of "
            "the data."
        )


def _name(call: dict[str, Any]) -> str:
    return str(call.get("function", call).get("name", ""))
