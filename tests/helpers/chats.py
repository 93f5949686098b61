"""What the tests of chats share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from helpers.chat_templates import chat_tokenizer
from helpers.models import TINY_CONFIGS
from milora_lightning.data.encoding.chat import ChatTemplate, Message, Span


def ids_of(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return ids


def folder_of(path: Path, name: str, **generation: Any) -> str:
    """A tiny model with a chat tokenizer, whose own generation config says more than greedy decoding wants."""
    tokenizer = chat_tokenizer(name)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY_CONFIGS["llama"].to_dict(), "vocab_size": len(tokenizer)}))
    for option, value in {"eos_token_id": 1, **generation}.items():
        setattr(model.generation_config, option, value)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def render_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """Write a chat in the tokenizer's chat template, as token ids and the spans that a model is to learn."""
    template = ChatTemplate.of(tokenizer)
    return template.tokenize([template.write(messages)])[0]
