"""What the tests of the data share: a small real tokenizer, and sources in memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE, adds_specials: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that, if asked for special tokens, adds BOS before a text and EOS after it."""
    backend = Tokenizer.from_str(_trained())
    if adds_specials:
        ids = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=chat_template,
    )


@functools.cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Below is an instruction that describes a task. Write a response."] * 9, trainer)
    return str(backend.to_str())


def with_a_space_before_texts(merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer like LLaMA's: what stands alone gets a space before it, what follows a special token none."""
    joined = ["".join(pair) for pair in merges]
    tokens = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(32, 127)), "\n", *joined]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class InMemory:
    """A source of rows (prompt, response)."""

    def __init__(self, **splits: Sequence[tuple[str, str]]) -> None:
        self.splits = splits

    def load(self, split: str) -> datasets.Dataset | None:
        rows = self.splits.get(split)
        return None if rows is None else datasets.Dataset.from_list([{"prompt": p, "response": r} for p, r in rows])


def rows(count: int) -> list[tuple[str, str]]:
    """Rows of different lengths in no order of length."""
    return [(f"Question {i}" + " a" * (7 * i % 13), f"Answer {i}" + " b" * (5 * i % 11)) for i in range(count)]


def isolate_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
