"""Collators for loss batches and for prompts to generate from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from milora_lightning.config import IGNORE_INDEX
from milora_lightning.data.batches.sampling import PAD_INDEX

Example = dict[str, Any]
TEXT_COLUMNS = ("prompt", "instruction", "reference", "task")  # texts that a batch of prompts carries along


class PaddedDataset(Dataset[Example]):
    """Tokenized examples, and at index −1 an empty one that does not count: a prompt without response and reference.

    Args:
        examples: Examples with ``input_ids`` and ``prompt_length``; at least one.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __getitem__(self, index: int) -> Example:
        """Return an example, or the empty one."""
        if index != PAD_INDEX:
            return dict(self.examples[index])
        first = self.examples[0]
        prompt = first["input_ids"][: first["prompt_length"]]
        return {**first, "input_ids": prompt, "spans": [], "reference": None}

    def __len__(self) -> int:
        return len(self.examples)


class Collator:
    """Collates examples to batches for computing the loss.

    Args:
        pad_token_id: Id of the padding token.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this. Fewer different lengths mean fewer
            compilations, and multiples of 8 suit the matrix units of GPUs.

    >>> batch = Collator(pad_token_id=0, pad_to_multiple_of=4)([{"input_ids": [5, 6, 7], "prompt_length": 2}])
    >>> batch["input_ids"], batch["attention_mask"], batch["labels"]
    (tensor([[5, 6, 7, 0]]), tensor([[1, 1, 1, 0]]), tensor([[-100, -100,    7, -100]]))
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Collate examples.

        Args:
            examples: Each with ``input_ids`` and ``spans`` (start, stop, start, stop ... of the ids to learn); or with
                ``prompt_length``, after which all ids, or those up to ``response_end``, are learned.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape (batch, length), padded on the right;
            labels are −100 outside the responses.
        """
        width = round_up(max(len(e["input_ids"]) for e in examples), self.multiple)
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for row, example in enumerate(examples):
            ids = torch.tensor(example["input_ids"])
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            for start, stop in learned_spans(example):
                labels[row, start:stop] = ids[start:stop]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class PromptCollator:
    """Collates prompts for generation; the key ``reference`` distinguishes these batches from loss batches.

    Args:
        pad_token_id: Id of the padding token.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate the prompts of examples.

        Args:
            examples: Each with ``input_ids``, ``prompt_length`` and the texts below.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 of shape (batch, length), padded on the left, and the lists
            ``prompt`` (what the model reads, as text), ``instruction`` (the prompt without its template), ``reference``
            (None for examples that do not count) and ``task``.
        """
        width = round_up(max(e["prompt_length"] for e in examples), self.multiple)
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, example in enumerate(examples):
            length = example["prompt_length"]
            input_ids[row, width - length :] = torch.tensor(example["input_ids"][:length])
            attention_mask[row, width - length :] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            **{column: [e[column] for e in examples] for column in TEXT_COLUMNS},
        }


def learned_spans(example: Example) -> list[tuple[int, int]]:
    """Return the spans (start, stop) of an example's ids that are learned.

    >>> learned_spans({"input_ids": range(9), "spans": [1, 3, 5, 9]})
    [(1, 3), (5, 9)]
    """
    spans = example.get("spans")
    if spans is None:
        return [(example["prompt_length"], example.get("response_end", len(example["input_ids"])))]
    return list(zip(spans[::2], spans[1::2], strict=True))


def round_up(length: int, multiple: int) -> int:
    """Round a length up to a multiple.

    Args:
        length: The length.
        multiple: The number that the result is a multiple of.
    """
    return -(-length // multiple) * multiple
