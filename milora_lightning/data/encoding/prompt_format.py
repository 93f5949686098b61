"""How a model was asked in training, as a record from which whatever generates later asks alike."""

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
"""The entry of a checkpoint, among the data's, that holds the record."""

ONE_QUESTION = "{% set asked = namespace(instruction='') %}"
"""What chat templates begin with that write the prompts of ``alpaca``, ``plain`` and their kin."""


def asking_suffix(prompt_suffix: str, generation_prompt_suffix: str | None) -> str:
    """Return what prompts to answer end in: as those of training, unless another suffix is given.

    >>> asking_suffix("Think.", None), asking_suffix("Think.", "")
    ('Think.', '')
    """
    return prompt_suffix if generation_prompt_suffix is None else generation_prompt_suffix


@dataclass(frozen=True)
class PromptFormat:
    """What stands around a prompt, and what ends an answer.

    Args:
        template: Name of the prompt template.
        prompt_suffix: What every prompt ends in, after the template.
        chat_template: A Jinja template that writes a user's message as the same prompt, token by token; a system
            message stands for the instruction, if the user's is an input to it. None if no template can.
        end_of_turn: The token that ends an answer.
        generation_prompt_suffix: What prompts to answer end in, in place of ``prompt_suffix``; None for the same.
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
        """Describe how :func:`milora_lightning.data.tokenize_dataset` writes prompts with these arguments.

        Args:
            tokenizer: The tokenizer.
            template: Name of the prompt template.
            prompt_suffix: What prompts end in.
            generation_prompt_suffix: What prompts to answer end in; None for the same.
            asks: Whether the chat template is to write prompts to answer, not those of training.
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
        """What prompts to answer end in, after the template."""
        return asking_suffix(self.prompt_suffix, self.generation_prompt_suffix)

    @property
    def tokenizers_template(self) -> str | None:
        """The chat template that the tokenizer had in training, where prompts were written by that."""
        if self.template != "chat" or self.chat_template is None:
            return None
        return self.chat_template.removesuffix(_suffix_in_jinja(self.asking_suffix))

    def record(self) -> dict[str, Any]:
        """Return what :meth:`found_in` reads, of primitives alone."""
        return asdict(self)

    def difference(self, other: PromptFormat) -> str:
        """Say in what another format differs.

        >>> PromptFormat("plain", "", None, "</s>").difference(PromptFormat("alpaca", "", None, "</s>"))
        "template='plain', here it is 'alpaca'"
        """
        mine, theirs = self.record(), other.record()
        for name in ("template", "prompt_suffix", "generation_prompt_suffix", "end_of_turn", "chat_template"):
            if mine[name] != theirs[name]:
                return f"{name}={mine[name]!r:.200}, here it is {theirs[name]!r:.200}"
        return ""

    def applied_to(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Return a tokenizer whose chat template asks as in training, a copy if that is not its own."""
        own = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if own == self.chat_template:
            return tokenizer
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = self.chat_template
        return tokenizer


def data_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the data of a run left in its checkpoint; nothing if there is none, or it is of another module."""
    states = (state for state in checkpoint.values() if isinstance(state, dict))
    return next((state for state in states if KEY in state), {})


def warn_of_another(trained: PromptFormat, now: PromptFormat) -> None:
    """Say it where a model is asked in another format than it was trained in, and how to ask as in training."""
    if trained == now:
        return
    remedy = (
        f" Set data.template: {trained.template} to ask as in training." if trained.template != now.template else ""
    )
    warn(f"The checkpoint was trained on prompts of another format: {trained.difference(now)}.{remedy}")


def for_conversations(
    tokenizer: PreTrainedTokenizerBase, template: TemplateName, prompt_suffix: str, asks: bool = False
) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose chat template writes conversations as a template writes prompts.

    Args:
        tokenizer: The tokenizer.
        template: Name of the template.
        prompt_suffix: What every prompt ends in.
        asks: Whether as it writes prompts to answer, not those of training.

    Raises:
        ValueError: If no chat template does with this tokenizer.
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
    """Tell whether a chat template writes the prompts of ``alpaca`` or its kin, which hold one question each."""
    return ONE_QUESTION in chat_template


def _chat_template(tokenizer: PreTrainedTokenizerBase, template: TemplateName, suffix: str, asks: bool) -> str | None:
    """Return the chat template that writes prompts as a template does, down to their tokens; None if there is none."""
    probe = "What is 1 plus 2?"
    want = bos_prefix(tokenizer) + token_ids([renders(template, asks)(probe, "", tokenizer) + suffix], tokenizer)[0]
    bos = "{{ bos_token }}" if bos_prefix(tokenizer) else ""
    # Some tokenizers put a space before a text that stands alone, and none behind a BOS token.
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
    assert after == after_input  # what is between a question and its answer
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
    """Write what chat templates end in for prompts to end in a suffix."""
    return f"{{% if add_generation_prompt %}}{{{{ {_literal(suffix)} }}}}{{% endif %}}" if suffix else ""


def _literal(text: str) -> str:
    """Write a text as a string of Jinja, whose escapes are those of JSON but for surrogates."""
    return json.dumps(text, ensure_ascii=False)
