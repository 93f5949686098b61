"""Chats formatted with a tokenizer's chat template, and the spans of their tokens to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from milora_lightning.utils.errors import InvalidInputError

Message = dict[str, Any]  # role, content, and any other fields that a template reads

SYSTEM, USER, ANSWER = (f"milora {role} probe" for role in ("system", "user", "answer"))  # in no template


class ChatTemplateError(InvalidInputError):
    """A chat template cannot format a chat, or the tokens to learn cannot be located in the result."""


class Span(NamedTuple):
    """A range of tokens from ``start`` to ``stop``, exclusive."""

    start: int
    stop: int


@dataclass(frozen=True)
class ChatTemplate:
    """The parts that a tokenizer's chat template adds around the texts of a chat.

    Args:
        tokenizer: The tokenizer.
        lead: Text between the prompt and the assistant's text: often nothing, or an empty thinking block.
        tail: Text after the assistant's text.
        end_of_turn: Id of the token that ends the assistant's turn, the first special or added token of ``tail``; None
            if there is none.
        behind: Number of tokens in ``tail`` after the end of turn, such as a line break.
        takes_system: Whether it writes a system message.
    """

    tokenizer: PreTrainedTokenizerBase
    lead: str
    tail: str
    end_of_turn: int | None
    behind: int
    takes_system: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """Analyze a tokenizer's chat template by writing a chat of one question and one answer.

        Raises:
            ChatTemplateError: If there is no chat template, or it cannot write such a chat.
        """
        if not tokenizer.chat_template:
            raise ChatTemplateError(
                f"The tokenizer of {tokenizer.name_or_path!r} has no chat template. Use template='alpaca' or 'plain', "
                "or a model made for chat."
            )
        question, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        prompt, whole = write([question], tokenizer, True), write([question, answer], tokenizer, False)
        if USER not in prompt or ANSWER not in whole:
            missing = "user" if USER not in prompt else "assistant"
            raise ChatTemplateError(
                f"The chat template of {tokenizer.name_or_path!r} leaves out the text of the {missing}'s message. "
                f"Give the tokenizer one that writes it, or use {_OTHERS}."
            )
        check_prefix(prompt, whole, tokenizer)
        lead, _, tail = whole[len(prompt) :].rpartition(ANSWER)
        special = (set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)) - _unknown(tokenizer)
        after = token_ids([tail], tokenizer)[0]
        # Gemma has added tokens of white space, which do not end turns.
        ends = [i for i, token in enumerate(after) if token in special and tokenizer.decode([token]).strip()]
        end_of_turn, behind = (after[ends[0]], len(after) - 1 - ends[0]) if ends else (None, 0)
        return cls(tokenizer, lead, tail, end_of_turn, behind, _takes_system(tokenizer))

    def write(self, messages: Sequence[Message], prefill: str = "") -> tuple[str, str]:
        """Write a chat.

        Args:
            messages: Messages with ``role`` and ``content``; the last one is the assistant's. A system message is put
                before the first user message's text if the template does not take one.
            prefill: Text that the assistant's turn starts with; it belongs to the prompt.

        Returns:
            The prompt, as it is written for generation, and the whole chat, which begins with it. The texts contain
            all special tokens: tokenize them without adding any.

        Raises:
            ChatTemplateError: If the template refuses the chat, leaves out a part of the answer, or begins the answer
                differently than for generation.
        """
        messages = list(messages) if self.takes_system else fold_system(messages)
        *before, answer = messages
        whole = write([*before, {**answer, "content": prefill + answer["content"]}], self.tokenizer, False)
        prompt = write(before, self.tokenizer, True) + prefill
        check_prefix(prompt, whole, self.tokenizer, prefill)
        written = whole[len(prompt) :]
        if not (
            written.endswith(self.tail)
            and dense(written[: len(written) - len(self.tail)]).endswith(dense(answer["content"]))
        ):
            raise ChatTemplateError(
                f"the chat template of {self.tokenizer.name_or_path!r} changes the answer: {answer['content']!r:.80} "
                f"has become {written!r:.80}. Bring the answer into the form that the template expects, or use "
                f"{_OTHERS}."
            )
        return prompt, whole

    def tokenize(self, chats: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[Span]]]:
        """Tokenize chats.

        The ids are those of the whole text. If a token would span the boundary between prompt and answer, the two are
        tokenized separately, because generation starts from the tokens of the prompt only.

        Args:
            chats: What :meth:`write` returned.

        Returns:
            For each chat its token ids and the spans to learn: a single one, from the end of the prompt to the token
            that ends the turn, which is the EOS token if the template has none.

        Raises:
            ChatTemplateError: If the tokens do not decode to the text, or the end of turn is not among them.
        """
        prompts, wholes = (token_ids([chat[part] for chat in chats], self.tokenizer) for part in (0, 1))
        rows = []
        for (prompt, whole), prompt_ids, ids in zip(chats, prompts, wholes, strict=True):
            if ids[: len(prompt_ids)] != prompt_ids:
                ids = self._joined(prompt_ids, whole[len(prompt) :], ids)
            if self.end_of_turn is None:
                ids = [*ids, cast(int, self.tokenizer.eos_token_id)]
            stop = len(ids) - self.behind
            if self.end_of_turn is not None and ids[stop - 1] != self.end_of_turn:
                raise ChatTemplateError(
                    f"the end of turn {self.tokenizer.decode([self.end_of_turn])!r} is not found in the tokens of "
                    f"{whole!r:.80}. Use {_OTHERS}."
                )
            rows.append((ids, [Span(len(prompt_ids), stop)]))
        return rows

    def respond(self, prompt: str, answers: Sequence[str]) -> list[list[int]]:
        """Return the token ids of answers to a prompt that :meth:`write` wrote, each up to the end of the turn."""
        chats = [(prompt, prompt + self.lead + answer + self.tail) for answer in answers]
        return [ids[span.start : span.stop] for ids, (span,) in self.tokenize(chats)]

    def _joined(self, prompt_ids: list[int], rest: str, whole_ids: list[int]) -> list[int]:
        ids = prompt_ids + token_ids([rest], self.tokenizer)[0]
        if self.tokenizer.decode(ids) != self.tokenizer.decode(whole_ids):
            raise ChatTemplateError(
                f"the tokenizer of {self.tokenizer.name_or_path!r} joins the end of the prompt and the beginning of "
                f"the answer {rest!r:.40} in one token, and cannot write them one by one. Take white space off the "
                f"beginning of the answer, or use {_OTHERS}."
            )
        return ids


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize texts without adding special tokens."""
    if not texts:
        return []
    # verbose=False: no warning about the tokenizer's maximum length, since examples that are too long are truncated.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return cast("list[list[int]]", encoded["input_ids"])


def fold_system(messages: Sequence[Message]) -> list[Message]:
    r"""Put a system message before the first user's text.

    >>> fold_system([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])
    [{'role': 'user', 'content': 'Be kind.\n\nHi'}]
    """
    if len(messages) < 2 or [message["role"] for message in messages[:2]] != ["system", "user"]:
        return list(messages)
    system, user, *others = messages
    if not (isinstance(system["content"], str) and isinstance(user["content"], str)):
        return list(messages)
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]


_OTHERS = "template='alpaca' or 'plain'"


def write(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    generates: bool,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """Format messages with a tokenizer's chat template, with the generation prompt if ``generates``.

    Args:
        messages: The messages, with ``role`` and ``content``.
        tokenizer: The tokenizer with the template.
        generates: Whether the text ends where an answer is to begin.
        tools: Descriptions of functions that the model may call.

    Raises:
        ChatTemplateError: If the template refuses them.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools and list(tools), tokenize=False, add_generation_prompt=generates
        )
    except Exception as error:  # a template is a program, and may raise any error
        roles = [message["role"] for message in messages]
        raise ChatTemplateError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a chat of the roles {roles}: {error}. Bring the "
            f"chat into the form that it expects, or use {_OTHERS}."
        ) from error
    return cast(str, text)


def check_prefix(prompt: str, whole: str, tokenizer: PreTrainedTokenizerBase, prefill: str = "") -> None:
    """Check that a chat begins with its prompt.

    Args:
        prompt: The prompt, as written for generation.
        whole: The chat with its answer.
        tokenizer: The tokenizer, for the message.
        prefill: Text that the answer starts with; it belongs to the prompt.

    Raises:
        ChatTemplateError: If it does not.
    """
    if whole.startswith(prompt):
        return
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    suffix = f" (prompt_suffix={prefill!r} included)" if prefill else ""
    raise ChatTemplateError(
        f"the chat template of {tokenizer.name_or_path!r} asks for an answer with {prompt[same:]!r:.60}{suffix}, where "
        f"before an answer that is there it has {whole[same:]!r:.60}: a model trained on the one would be asked with "
        f"the other. Give the tokenizer a template that writes both alike, or use {_OTHERS}."
    )


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    try:
        return SYSTEM in write(messages, tokenizer, True)
    except ChatTemplateError:
        return False


def _unknown(tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    return {tokenizer.unk_token_id} - {tokenizer.eos_token_id}  # in GPT-2 they are the same


def dense(text: str) -> str:
    """Remove all white space from a text."""
    return "".join(text.split())
