"""Batches from which the likeliest of given answers is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from milora_lightning.data.batching import Collator, Example, PromptCollator


class ChoiceCollator:
    """Makes the batches from which answers are chosen: those for generating, with every choice as a response.

    Args:
        tokenizer: The tokenizer of the prompts.
        choices: Returns the responses that a prompt leaves to choose from.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, choices: Callable[[str], list[str]], pad_to_multiple_of: int = 8
    ) -> None:
        self.tokenizer = tokenizer
        self.choices = choices
        self.prompts = PromptCollator(tokenizer.pad_token_id, pad_to_multiple_of)
        self.responses = Collator(tokenizer.pad_token_id, pad_to_multiple_of)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate examples.

        Args:
            examples: As for :class:`PromptCollator`.

        Returns:
            What :class:`PromptCollator` returns, ``choices`` (each example's, a list of lists), and ``responses``: what
            :class:`Collator` returns, one row for each choice of each example.
        """
        batch = self.prompts(examples)
        choices = [self.choices(example["instruction"]) for example in examples]
        rows = [
            {**example, "input_ids": [*example["input_ids"][: example["prompt_length"]], *ids]}
            for example, texts in zip(examples, choices, strict=True)
            for ids in self._ids(texts)
        ]
        return {**batch, "choices": choices, "responses": self.responses(rows)}

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [[*ids, self.tokenizer.eos_token_id] for ids in encoded]
