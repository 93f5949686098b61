"""Prompt templates: pure functions from an example's texts to what the model reads before it answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from milora_lightning.data.reading.values import question
from milora_lightning.utils.errors import InvalidInputError

TemplateName = Literal["alpaca", "chat", "plain"]
AUTO = "auto"  # the tokenizer's chat template for conversations, alpaca for prompts with responses

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)


VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %}{{ ' ' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHAT_TEMPLATES = {"vicuna": VICUNA}
"""Chat templates by name, for models whose tokenizers have none: Vicuna's is LLaVA-1.5's."""


def alpaca(prompt: str, input: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    r"""Write the prompt of Stanford Alpaca, which the MiLoRA paper uses.

    >>> alpaca("Add the numbers.", "1, 2").splitlines()[2:]
    ['### Instruction:', 'Add the numbers.', '', '### Input:', '1, 2', '', '### Response:']
    """
    return (ALPACA_WITH_INPUT if input else ALPACA).format(prompt=prompt, input=input)


def chat(prompt: str, input: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write one user message in the tokenizer's chat template, up to where the assistant begins.

    The text already holds all special tokens: tokenize it without adding any.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise InvalidInputError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template. Use template='alpaca' or 'plain', or "
            "a model made for chat."
        )
    message = {"role": "user", "content": question(prompt, input)}
    return cast(str, tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def plain(prompt: str, input: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    r"""Write the bare text.

    >>> plain("Add the numbers.", "1, 2")
    'Add the numbers.\n1, 2\n'
    """
    return f"{prompt}\n{input}\n" if input else f"{prompt}\n"


TEMPLATES: dict[TemplateName, Callable[[str, str, PreTrainedTokenizerBase], str]] = {
    "alpaca": alpaca,
    "chat": chat,
    "plain": plain,
}
"""What writes a prompt with its further input, by the name of the template."""


def name_of(template: str, conversations: bool) -> TemplateName:
    """Return the name of the template that an option stands for.

    Args:
        template: ``"auto"``, the name of a template, or the name of a chat template or path of a Jinja file, which
            becomes the tokenizer's chat template (:func:`with_template`).
        conversations: Whether there are conversations among the data.

    Raises:
        ValueError: If there is neither such a template nor such a file.

    >>> name_of("auto", False), name_of("auto", True), name_of("plain", True)
    ('alpaca', 'chat', 'plain')
    """
    if template in TEMPLATES:
        return template
    if template == AUTO:
        return "chat" if conversations else "alpaca"
    if template not in CHAT_TEMPLATES and not Path(template).is_file():
        raise InvalidInputError(
            f"There is no template {template!r}: {', '.join([AUTO, *TEMPLATES, *CHAT_TEMPLATES])} are known, and the "
            "path of a file that holds a chat template in Jinja."
        )
    return "chat"


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer with a named chat template or that of a Jinja file; else the tokenizer itself.

    Raises:
        ValueError: As :func:`name_of`.
    """
    name_of(template, False)
    if template == AUTO or template in TEMPLATES:
        return tokenizer
    jinja = CHAT_TEMPLATES.get(template) or Path(template).read_text(encoding="utf-8")
    if tokenizer.chat_template == jinja:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = jinja
    return tokenizer


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before a text: the BOS token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
