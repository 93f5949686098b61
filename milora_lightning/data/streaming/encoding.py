"""Encoding of a stream's rows, and the check of the Trainer's options for streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerBase

from milora_lightning.data.batches.batching import Example
from milora_lightning.data.columns import as_columns
from milora_lightning.data.encoding.examples import encode
from milora_lightning.data.encoding.templates import TemplateName
from milora_lightning.data.encoding.turn_encoding import TrainOn
from milora_lightning.data.reading.rows import BEGINNING
from milora_lightning.utils.errors import InvalidInputError


@dataclass(frozen=True)
class StreamEncoder:
    """Encodes training rows in the same way as :func:`milora_lightning.data.tokenize_dataset`.

    Args:
        tokenizer: The tokenizer; for details of the first six arguments see that function.
        template: Name of the prompt template.
        prompt_suffix: Suffix of every prompt.
        max_length: Maximum number of tokens in an example.
        train_on: Which turns of conversations are learned.
        train_on_inputs: Whether prompts are learned as well.
        conversations: Whether the template, which may have been chosen by the first rows, supports conversations.
        only_texts: Whether all of the first rows are plain texts.
        passed: Number of rows of the data before the stream, for messages.
        embeddings: Number of token ids that the model has embeddings for; None if it is not known.
    """

    tokenizer: PreTrainedTokenizerBase
    template: TemplateName
    prompt_suffix: str
    max_length: int
    train_on: TrainOn
    train_on_inputs: bool
    conversations: bool
    only_texts: bool
    passed: int = 0
    embeddings: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]], indices: Sequence[int]) -> list[Example]:
        """Encode rows.

        Args:
            rows: The rows.
            indices: Their places in the stream.

        Returns:
            Examples with ``input_ids`` and ``spans``; rows with nothing to learn are dropped.

        Raises:
            ValueError: If a row cannot be encoded, or is of a kind that does not occur in the first rows.
        """
        indices = [index + self.passed for index in indices]
        columns = as_columns(rows, indices, "train")
        size = len(rows)
        messages, texts = (columns.get(name) or [""] * size for name in ("messages", "text"))
        for index, conversation, text in zip(indices, messages, texts, strict=True):
            if (conversation and not self.conversations) or (self.only_texts and not text):
                kind = "a conversation" if conversation else "a prompt"
                raise InvalidInputError(
                    f"Row {index + 1} of the train data is {kind}, and none of the first {BEGINNING} is, by which the "
                    "template was chosen. Put one of its kind among these."
                )
        encoded = encode(
            columns,
            indices,
            self.tokenizer,
            self.template,
            self.prompt_suffix,
            self.max_length,
            self.train_on,
            train_on_inputs=self.train_on_inputs,
        )
        if self.embeddings is not None and len(self.tokenizer) > self.embeddings:
            self._check_ids(encoded["input_ids"])
        ids = (np.asarray(each, dtype=np.int32) for each in encoded["input_ids"])
        return [{"input_ids": each, "spans": spans} for each, spans in zip(ids, encoded["spans"], strict=True)]

    def _check_ids(self, examples: list[list[int]]) -> None:
        token = max((max(ids) for ids in examples), default=0)
        if self.embeddings is not None and token >= self.embeddings:
            raise InvalidInputError(
                f"The train data contains the token {self.tokenizer.convert_ids_to_tokens(token)!r} with the id "
                f"{token}, but the model has embeddings for {self.embeddings} tokens. Use the model's own tokenizer, "
                "or resize the model's embeddings, then train them too or save the model."
            )


def check_trainer(trainer: Trainer) -> None:
    """Check that a Trainer can train on a stream.

    Raises:
        ValueError: If it lacks ``max_steps``, or counts epochs, or overfits batches.
    """
    if trainer.max_steps < 1:
        raise InvalidInputError(
            "data.streaming needs trainer.max_steps: the length of a stream is not known. Set how many optimizer steps "
            "to train."
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise InvalidInputError("trainer.overfit_batches does not work with data.streaming. Leave one of them out.")
    if trainer.max_epochs not in (None, -1) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise InvalidInputError(
            f"trainer.max_epochs is {trainer.max_epochs}, but the length of an epoch of a stream is not known: set "
            "trainer.max_epochs: -1 in addition to trainer.max_steps, or leave data.streaming out."
        )
