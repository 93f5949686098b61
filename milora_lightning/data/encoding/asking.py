"""Prompts for generation from messages, and streaming of answers as text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from milora_lightning.data.encoding.chat import Message, fold_system, token_ids
from milora_lightning.data.encoding.prompt_format import reads_one_question
from milora_lightning.data.reading.values import question
from milora_lightning.data.tokenizing import padding_id
from milora_lightning.models.limits import position_limit
from milora_lightning.utils.errors import InvalidInputError


class NotAskableError(InvalidInputError):
    """The tokenizer has no chat template, or one that refuses a conversation."""


def check_askable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the prompt format of a model is known.

    Raises:
        NotAskableError: If its tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise NotAskableError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, so it is not known how to ask: choose "
            "one with --template (alpaca, plain or a Jinja file; in Python, template=...)."
        )


def prompt_ids(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] | None = None
) -> list[int]:
    """Format a conversation with a tokenizer's chat template, up to where the assistant begins.

    Args:
        messages: Messages with ``role`` and ``content``. A system message is put before the first user's text if the
            template refuses or ignores it.
        tokenizer: A tokenizer whose chat template is that of training, as :func:`milora_lightning.load_for_inference`
            returns it.
        tools: Descriptions of functions that the model may call.

    Returns:
        Token ids.

    Raises:
        NotAskableError: If there is no chat template, or it refuses the conversation or leaves out a part of it.
    """
    check_askable(tokenizer)
    _check_is_written(messages, tokenizer)
    folded = fold_system(messages)
    try:
        asked, text = messages, _write(messages, tokenizer, tools)
        if len(folded) < len(messages) and messages[0]["content"].strip() not in text:
            asked, text = folded, _write(folded, tokenizer, tools)
    except NotAskableError:
        if len(folded) == len(messages):
            raise
        asked, text = folded, _write(folded, tokenizer, tools)
    if tools and text == _write(asked, tokenizer, None):
        raise NotAskableError("The chat template leaves out the tools. Take them out of the row.")
    return token_ids([text], tokenizer)[0]


def _check_is_written(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a prompt template gets only questions and answers; it would take anything else for an answer."""
    others = [m["role"] for m in messages if m["role"] not in ("system", "user", "assistant") or m.get("tool_calls")]
    if others and reads_one_question(str(tokenizer.chat_template)):
        raise NotAskableError("The template of training has no place for tools, their calls and their results.")


def _write(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] | None
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=tools and list(tools), tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:  # a template is a program, and may raise any error
        roles = ", ".join(message["role"] for message in messages)
        raise NotAskableError(f"The chat template refuses a conversation of the roles {roles}: {error}") from error


def messages_for(prompt: str, input: str, system: str, tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """Convert a prompt and its input to messages that the template formats as in training.

    Args:
        prompt: Question or instruction.
        input: Further context; may be empty.
        system: A system message; may be empty.
        tokenizer: The tokenizer that formats the messages.
    """
    if input and not system and tokenizer.chat_template and reads_one_question(str(tokenizer.chat_template)):
        return [{"role": "system", "content": prompt}, {"role": "user", "content": input}]
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question(prompt, input)}]


def padded(prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> dict[str, Tensor]:
    """Collate prompts to a batch: ``input_ids`` and ``attention_mask`` (batch, length), padded on the left.

    Args:
        prompts: Token ids of each prompt.
        tokenizer: The tokenizer, for its padding token.
        device: Device of the batch.
    """
    width = max(map(len, prompts))
    input_ids = torch.tensor([[padding_id(tokenizer)] * (width - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def question_batch(
    questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, Tensor]:
    """Collate separate questions to a batch; see :func:`padded`.

    Args:
        questions: The questions.
        tokenizer: As for :func:`prompt_ids`.
        device: Device of the batch.

    Raises:
        NotAskableError: As for :func:`prompt_ids`.
    """
    prompts = [prompt_ids([{"role": "user", "content": question}], tokenizer) for question in questions]
    return padded(prompts, tokenizer, device)


def room(model: PreTrainedModel, prompt: int, max_new_tokens: int) -> tuple[int, str]:
    """Return how many tokens an answer may have, and a message about it.

    Args:
        model: The model.
        prompt: Number of tokens of the prompt.
        max_new_tokens: Maximum number of tokens of the answer.

    Returns:
        The number of tokens, which is lower if the model has a fixed number of positions, and 0 if none is left; and a
        sentence, empty if there are enough positions.
    """
    limit = position_limit(model)
    if limit is None or prompt + max_new_tokens - 1 <= limit.number:  # the model never reads the last token
        return max_new_tokens, ""
    if limit.fixed:
        left = max(limit.number - prompt + 1, 0)
        return left, f"The model has {limit.number} positions, and the prompt takes {prompt}: {left} are left."
    if prompt <= limit.number:  # the answer may end before that
        return max_new_tokens, ""
    return (
        max_new_tokens,
        f"The prompt has {prompt} tokens, and the model was trained on no more than {limit.number} positions.",
    )


class TextStream(BaseStreamer):  # type: ignore[misc]
    """Passes on an answer piece by piece while it is generated.

    The pieces concatenate to the decoded answer: characters that consist of several tokens are passed on when complete.

    Args:
        tokenizer: The tokenizer.
        stop: Tokens that end an answer and are not part of it.
        write: Called with each piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Collection[int], write: Callable[[str], Any]) -> None:
        self.tokenizer = tokenizer
        self.stop = frozenset(stop)
        self.write = write
        self.text = ""
        self._ids: list[int] | None = None  # None until the prompt has been received

    def put(self, value: Tensor) -> None:
        """Receive the prompt, and then one token at a time."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self.stop]
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("�"):
            self._pass_on(text)

    def end(self) -> None:
        """Pass on the rest."""
        self._pass_on(self.tokenizer.decode(self._ids or [], skip_special_tokens=True))

    def _pass_on(self, text: str) -> None:
        new, self.text = text[len(self.text) :], text
        if new:
            self.write(new)
