"""A collator for multiple choice by likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from milora_lightning.data.batches.batching import Collator, Example, PromptCollator
from milora_lightning.data.encoding.chat import ChatTemplate, token_ids
from milora_lightning.data.tokenizing import padding_id


class ChoiceCollator:
    """Collates prompts with every choice as a response, to choose answers by their likelihood.

    Args:
        tokenizer: The tokenizer of the prompts.
        choices: Returns the possible responses to a prompt.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
        chat: The chat template of the prompts; None for a prompt template such as ``"alpaca"``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        choices: Callable[[str], list[str]],
        pad_to_multiple_of: int = 8,
        chat: ChatTemplate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.choices = choices
        self.chat = chat
        self.prompts = PromptCollator(padding_id(tokenizer), pad_to_multiple_of)
        self.responses = Collator(padding_id(tokenizer), pad_to_multiple_of)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate examples.

        Args:
            examples: As for :class:`PromptCollator`.

        Returns:
            The batch of :class:`PromptCollator`, ``choices`` (a list for each example), and ``responses``, a batch of
            :class:`Collator` with one row for each choice of each example.
        """
        batch = self.prompts(examples)
        choices = [self.choices(example["instruction"]) for example in examples]
        rows = [
            self._row(example, ids)
            for example, texts in zip(examples, choices, strict=True)
            for ids in self._responses(example["prompt"], texts)
        ]
        return {**batch, "choices": choices, "responses": self.responses(rows)}

    def _row(self, example: Example, response: list[int]) -> Example:
        ids = [*example["input_ids"][: example["prompt_length"]], *response]
        return {**example, "input_ids": ids, "spans": [example["prompt_length"], len(ids)]}

    def _responses(self, prompt: str, texts: list[str]) -> list[list[int]]:
        if self.chat is not None:
            return self.chat.respond(prompt, texts)
        return [[*ids, self.tokenizer.eos_token_id] for ids in token_ids(texts, self.tokenizer)]
