"""The prompt format of training, as a record for using the same format in later generation."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from milora_lightning.data.encoding.chat import ChatTemplate, token_ids
from milora_lightning.data.encoding.templates import TemplateName, bos_prefix, renders
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

KEY = "prompt_format"
"""Entry of the data's state in a checkpoint with the record."""

ONE_QUESTION = "{% set asked = namespace(instruction='') %}"
"""Beginning of chat templates that produce the prompts of ``alpaca``, ``plain`` and similar templates."""


def asking_suffix(prompt_suffix: str, generation_prompt_suffix: str | None) -> str:
    """Return the suffix of prompts to answer: that of training, unless another one is given.

    >>> asking_suffix("Think.", None), asking_suffix("Think.", "")
    ('Think.', '')
    """
    return prompt_suffix if generation_prompt_suffix is None else generation_prompt_suffix


@dataclass(frozen=True)
class PromptFormat:
    """The format of prompts, and the end of answers.

    Args:
        template: Name of the prompt template.
        prompt_suffix: What every prompt ends in, after the template.
        chat_template: A Jinja template that formats a user's message as the same prompt, token by token; if the user's
            message is an input, a system message is the instruction. None if no template can.
        end_of_turn: The token that ends an answer.
        generation_prompt_suffix: Suffix of prompts to answer, instead of ``prompt_suffix``; None for the same.
    """

    template: TemplateName
    prompt_suffix: str
    chat_template: str | None
    end_of_turn: str
    generation_prompt_suffix: str | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateName,
        prompt_suffix: str = "",
        generation_prompt_suffix: str | None = None,
        asks: bool = True,
    ) -> PromptFormat:
        """Describe how :func:`milora_lightning.data.tokenize_dataset` formats prompts with these arguments.

        Args:
            tokenizer: The tokenizer.
            template: Name of the prompt template.
            prompt_suffix: Suffix of prompts.
            generation_prompt_suffix: Suffix of prompts to answer; None for the same.
            asks: Whether the chat template should format prompts to answer rather than those of training.
        """
        suffix = asking_suffix(prompt_suffix, generation_prompt_suffix) if asks else prompt_suffix
        if template == "chat":
            end = ChatTemplate.of(tokenizer).end_of_turn
            jinja: str | None = cast(str, tokenizer.get_chat_template()) + _suffix_in_jinja(suffix)
            token = tokenizer.eos_token if end is None else tokenizer.convert_ids_to_tokens(end)
        else:
            jinja, token = _chat_template(tokenizer, template, suffix, asks), tokenizer.eos_token
        return cls(template, prompt_suffix, jinja, cast(str, token), generation_prompt_suffix)

    @classmethod
    def found_in(cls, checkpoint: Mapping[str, Any]) -> PromptFormat | None:
        """Return the record that the data of a run left in its checkpoint; None if there is none."""
        record = data_state(checkpoint).get(KEY)
        return None if record is None else cls(**record)

    @property
    def asking_suffix(self) -> str:
        """Suffix of prompts to answer, after the template."""
        return asking_suffix(self.prompt_suffix, self.generation_prompt_suffix)

    @property
    def tokenizers_template(self) -> str | None:
        """The chat template that the tokenizer had in training, if it formatted the prompts."""
        if self.template != "chat" or self.chat_template is None:
            return None
        return self.chat_template.removesuffix(_suffix_in_jinja(self.asking_suffix))

    def record(self) -> dict[str, Any]:
        """Return the record that :meth:`found_in` reads, in primitive types."""
        return asdict(self)

    def difference(self, other: PromptFormat) -> str:
        """Describe the difference from another format.

        >>> PromptFormat("plain", "", None, "</s>").difference(PromptFormat("alpaca", "", None, "</s>"))
        "template='plain', here it is 'alpaca'"
        """
        mine, theirs = self.record(), other.record()
        for name in ("template", "prompt_suffix", "generation_prompt_suffix", "end_of_turn", "chat_template"):
            if mine[name] != theirs[name]:
                return f"{name}={mine[name]!r:.200}, here it is {theirs[name]!r:.200}"
        return ""

    def applied_to(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Return a tokenizer with the chat template of training; a copy if the tokenizer has a different one."""
        present = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if present == self.chat_template:
            return tokenizer
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = self.chat_template
        return tokenizer


def data_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the data module's state in a checkpoint; empty if there is none, or it is from another data module."""
    states = (state for state in checkpoint.values() if isinstance(state, dict))
    return next((state for state in states if KEY in state), {})


def warn_of_another(trained: PromptFormat, now: PromptFormat) -> None:
    """Warn if prompts have a different format from training, with the remedy.

    Args:
        trained: The format of training.
        now: The present format.
    """
    if trained == now:
        return
    remedy = (
        f" Set data.template: {trained.template} to ask as in training." if trained.template != now.template else ""
    )
    warn(f"The checkpoint was trained on prompts of another format: {trained.difference(now)}.{remedy}")


def for_conversations(
    tokenizer: PreTrainedTokenizerBase, template: TemplateName, prompt_suffix: str, asks: bool = False
) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose chat template formats conversations like a prompt template.

    Args:
        tokenizer: The tokenizer.
        template: Name of the template.
        prompt_suffix: Suffix of every prompt.
        asks: Whether to format prompts to answer rather than those of training.

    Raises:
        ValueError: If this is not possible with this tokenizer.
    """
    if template == "chat":
        return tokenizer
    prompt_format = PromptFormat.of(tokenizer, template, prompt_suffix, asks=asks)
    if prompt_format.chat_template is None:
        raise InvalidInputError(
            f"No chat template writes conversations as template={template!r} writes prompts with the tokenizer of "
            f"{tokenizer.name_or_path!r}. Use template='chat', or a Jinja file."
        )
    return prompt_format.applied_to(tokenizer)


def reads_one_question(chat_template: str) -> bool:
    """Return whether a chat template produces prompts of ``alpaca`` or similar templates, with one question each."""
    return ONE_QUESTION in chat_template


def _chat_template(tokenizer: PreTrainedTokenizerBase, template: TemplateName, suffix: str, asks: bool) -> str | None:
    """Return a chat template that produces the same prompts as a template, token by token; None if there is none."""
    probe = "What is 1 plus 2?"
    want = bos_prefix(tokenizer) + token_ids([renders(template, asks)(probe, "", tokenizer) + suffix], tokenizer)[0]
    bos = "{{ bos_token }}" if bos_prefix(tokenizer) else ""
    # Some tokenizers put a space before a text on its own, but not after a BOS token.
    for beginning in (bos, bos + "{{ ' ' }}"):
        jinja = beginning + _as_jinja(template, suffix, asks)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": probe}], chat_template=jinja, tokenize=False, add_generation_prompt=True
        )
        if token_ids([text], tokenizer)[0] == want:
            return jinja
    return None


def _as_jinja(template: TemplateName, suffix: str, asks: bool) -> str:
    """Write a template in Jinja, without BOS."""
    render = cast(Any, renders(template, asks))
    before, after = render("\0", "").split("\0")
    before_instruction, between, after_input = render("\0", "\1").replace("\1", "\0").split("\0")
    assert after == after_input  # the text between a question and its answer
    question = f"{_literal(before)} + message['content']"
    with_input = f"{_literal(before_instruction)} + asked.instruction + {_literal(between)} + message['content']"
    answer = _literal(after + suffix)
    return (
        f"{ONE_QUESTION}{{% for message in messages %}}"
        "{% if message['role'] == 'system' %}{% set asked.instruction = message['content'] %}"
        "{% elif message['role'] == 'user' %}"
        f"{{% if asked.instruction %}}{{{{ {with_input} }}}}{{% else %}}{{{{ {question} }}}}{{% endif %}}"
        "{% set asked.instruction = '' %}"
        f"{{% else %}}{{{{ {answer} + message['content'] + eos_token }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
    )


def _suffix_in_jinja(suffix: str) -> str:
    """Write the end of a chat template that adds a suffix to prompts."""
    return f"{{% if add_generation_prompt %}}{{{{ {_literal(suffix)} }}}}{{% endif %}}" if suffix else ""


def _literal(text: str) -> str:
    """Write a text as a Jinja string, whose escapes are those of JSON except for surrogates."""
    return json.dumps(text, ensure_ascii=False)
