"""Prompt templates: pure functions from an example's texts to the text that the model reads before it answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from milora_lightning.data.reading.values import question
from milora_lightning.utils.errors import InvalidInputError

TemplateName = Literal["alpaca", "chat", "plain", "metamath", "llm-adapters", "tulu"]
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
    r"""Write the prompt of Stanford Alpaca.

    >>> alpaca("Add the numbers.", "1, 2").splitlines()[2:]
    ['### Instruction:', 'Add the numbers.', '', '### Input:', '1, 2', '', '### Response:']
    """
    return (ALPACA_WITH_INPUT if input else ALPACA).format(prompt=prompt, input=input)


def chat(prompt: str, input: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Format one user message with the tokenizer's chat template, up to where the assistant begins.

    The text already contains all special tokens: tokenize it without adding any.

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


def metamath(prompt: str, input: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    r"""Write the prompt of MetaMath, PiSSA and MiLoRA: Alpaca's without the line break before the answer.

    >>> metamath("1 + 1?", "").endswith("\n\n### Response:")
    True
    """
    return alpaca(prompt, input).removesuffix("\n")


# LLM-Adapters writes its prompts as an indented string: this precedes each line of the template.
_INDENT = " " * 16


def llm_adapters(prompt: str, input: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    r"""Write the prompt that LLM-Adapters trains on: Alpaca's, indented, with white space in its empty lines.

    >>> llm_adapters("1 + 1?", "").split("\n")[-4:]
    ['                1 + 1?', '                ', '                ### Response:', '                ']
    """
    return _indented(prompt, input, " " if input else "  ", _INDENT)


def llm_adapters_asked(prompt: str, input: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    r"""Write the prompt that LLM-Adapters tests with, which has less white space than the one that it trains on.

    >>> llm_adapters_asked("1 + 1?", "").split("\n")[-4:]
    ['                1 + 1?', '', '                ### Response:', '                ']
    """
    return _indented(prompt, input, "" if input else " ", "")


def _indented(prompt: str, input: str, after_request: str, between: str) -> str:
    """Write LLM-Adapters' prompt.

    Args:
        prompt: Question or instruction.
        input: Further context; may be empty.
        after_request: Text after the first line.
        between: Content of the empty lines between sections.
    """
    first_line = (ALPACA_WITH_INPUT if input else ALPACA).partition("\n")[0]
    sections = [("Instruction", prompt), *([("Input", input)] if input else []), ("Response", "")]
    written = (f"{_INDENT}### {name}:\n{_INDENT}{text}" for name, text in sections)
    return f"{first_line}{after_request}\n\n" + f"\n{between}\n".join(written)


def tulu(prompt: str, input: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    r"""Write the prompt of open-instruct's Tulu models.

    >>> tulu("Say hello.", "")
    '<|user|>\nSay hello.\n<|assistant|>\n'
    """
    return f"<|user|>\n{question(prompt, input).strip()}\n<|assistant|>\n"


Render = Callable[[str, str, PreTrainedTokenizerBase], str]
TEMPLATES: dict[TemplateName, Render] = {
    "alpaca": alpaca,
    "chat": chat,
    "plain": plain,
    "metamath": metamath,
    "llm-adapters": llm_adapters,
    "tulu": tulu,
}
"""The function that formats a prompt with its input, by name of the template."""

ASKED: dict[TemplateName, Render] = {"llm-adapters": llm_adapters_asked}
"""Templates whose prompts differ between training and tests, as in the code they come from."""

TOGETHER: frozenset[TemplateName] = frozenset({"metamath", "llm-adapters", "tulu"})
"""Templates whose training texts are tokenized as a whole, as in the code they come from. In all others, prompt and
answer are tokenized separately, so that a model is prompted with exactly the tokens of its training."""


def renders(template: TemplateName, asks: bool) -> Render:
    """Return the function that formats a template's prompts.

    Args:
        template: Name of the template.
        asks: Whether to format prompts to answer rather than those of training.
    """
    return ASKED.get(template, TEMPLATES[template]) if asks else TEMPLATES[template]


def asks_otherwise(template: TemplateName) -> bool:
    """Return whether a template's prompts to answer may have different tokens from those of training."""
    return template in TOGETHER or template in ASKED


def name_of(template: str, conversations: bool) -> TemplateName:
    """Return the name of the template that an option refers to.

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
    """Return a copy of a tokenizer with a named chat template or that of a Jinja file; otherwise the tokenizer itself.

    Args:
        tokenizer: The tokenizer; not modified.
        template: As for :func:`name_of`.

    Raises:
        ValueError: As for :func:`name_of`.
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
