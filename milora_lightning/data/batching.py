"""Which examples make a batch, and how a batch becomes tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Example = dict[str, Any]
IGNORED = -100  # the label that the loss leaves out
FILLER = -1  # the index that stands for no example
TEXTS = ("prompt", "instruction", "reference", "task")  # what travels with a prompt
PIECE = 50  # most global batches whose examples are sorted together


class LengthGroupedSampler(DistributedSampler[int]):
    """Training order in which the examples of a batch are about equally long, so that little is padding.

    A random order is cut into pieces of 50 global batches (those of all ranks together; fewer where the data is
    small, lest the same examples met each epoch), each piece is sorted by length and cut into global batches, and
    these are shuffled. Rank k takes every N-th index from the k-th on, so
    that N ranks together see the very batches that one process with N times the batch size sees. If the examples do
    not share out evenly among the ranks, the first ones are repeated. The order is a function of seed and epoch
    alone.

    Being a ``DistributedSampler``, it is left alone by Lightning, which sets its epoch.

    Args:
        lengths: Length of each example.
        batch_size: Number of examples in the batch of one rank.
        shuffle: Whether to shuffle; otherwise the pieces come from the given order.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: This one.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.lengths = np.asarray(lengths)
        self.global_batch = batch_size * num_replicas
        self.start = 0
        """How many of this rank's indices the next iteration leaves out at its start; then zero again."""

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's indices."""
        order = self._order()
        repeated = np.resize(order, self.total_size - len(order))
        start, self.start = self.start, 0
        return iter(np.concatenate([order, repeated])[self.rank :: self.num_replicas][start:].tolist())

    def _order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        size = len(self.lengths)
        piece = self.global_batch * min(PIECE, max(1, size // self.global_batch // 4))
        order = generator.permutation(size) if self.shuffle else np.arange(size)
        for start in range(0, size, piece):
            indices = order[start : start + piece]
            order[start : start + piece] = indices[np.argsort(-self.lengths[indices], kind="stable")]
        batches = [order[start : start + self.global_batch] for start in range(0, size, self.global_batch)]
        if self.shuffle:
            # An incomplete batch stays last: elsewhere it would shift the borders of those after it.
            complete = len(batches) - (size % self.global_batch > 0)
            batches = [batches[i] for i in generator.permutation(complete)] + batches[complete:]
        return np.concatenate(batches)


class ResumableDataLoader(DataLoader[Any]):
    """A data loader over a :class:`LengthGroupedSampler` that can go on in the middle of an epoch.

    Attributes:
        passed: How many batches of the epoch have been handed out.
    """

    passed = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate over the batches of an epoch, the first time over those after ``skip``."""
        self.passed = cast(LengthGroupedSampler, self.sampler).start // (self.batch_size or 1)
        for batch in super().__iter__():
            self.passed += 1
            yield batch

    def skip(self, batches: int) -> None:
        """Leave out the first batches of the next iteration; a whole epoch's are none."""
        cast(LengthGroupedSampler, self.sampler).start = batches % len(self) * (self.batch_size or 1)


class EvaluationSampler(DistributedSampler[int]):
    """Each rank's share of a fixed order, with every example exactly once.

    If the examples do not share out evenly, the last ranks get the index −1, for which :class:`FilledDataset` has an
    example that counts nothing: all ranks run equally many batches, as sharded models need it, and no example is
    counted twice.

    Args:
        order: The indices of all ranks.
        num_replicas: Number of ranks.
        rank: This one.

    >>> [list(EvaluationSampler([2, 0, 1], num_replicas=2, rank=rank)) for rank in range(2)]
    [[2, 1], [0, -1]]
    """

    def __init__(self, order: Sequence[int], num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(order, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        self.order = list(order)

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's indices."""
        fillers = [FILLER] * (self.total_size - len(self.order))
        return iter((self.order + fillers)[self.rank :: self.num_replicas])


class FilledDataset(Dataset[Example]):
    """Tokenized examples, and at index −1 one that counts nothing: a prompt without response and reference.

    Args:
        examples: Examples with ``input_ids`` and ``prompt_length``; at least one.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __getitem__(self, index: int) -> Example:
        """Return an example, or the filler."""
        if index != FILLER:
            return dict(self.examples[index])
        first = self.examples[0]
        prompt = first["input_ids"][: first["prompt_length"]]
        return {**first, "input_ids": prompt, "response_end": len(prompt), "reference": None}

    def __len__(self) -> int:
        return len(self.examples)


class Collator:
    """Makes the batches on which the loss is taken.

    Args:
        pad_token_id: Id with which rows are filled up.
        pad_to_multiple_of: Lengths are rounded up to a multiple of this: few lengths mean few compilations, and
            multiples of 8 suit the matrix units of GPUs.

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
            examples: Each with ``input_ids`` and ``prompt_length``, and ``response_end`` where the last ids are not
                to be learned.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape (batch, length), padded on the right;
            labels are −100 outside the responses.
        """
        width = _round_up(max(len(e["input_ids"]) for e in examples), self.multiple)
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED)
        for row, example in enumerate(examples):
            ids, start = torch.tensor(example["input_ids"]), example["prompt_length"]
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            end = example.get("response_end", len(ids))  # a chat template may put more after the end of a turn
            labels[row, start:end] = ids[start:end]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class PromptCollator:
    """Makes the batches from which text is generated; the key ``reference`` tells them from the others.

    Args:
        pad_token_id: Id with which rows are filled up.
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
            ``prompt`` (what the model reads, as text), ``instruction`` (that without its template), ``reference``
            (None for examples that count nothing) and ``task``.
        """
        width = _round_up(max(e["prompt_length"] for e in examples), self.multiple)
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, example in enumerate(examples):
            length = example["prompt_length"]
            input_ids[row, width - length :] = torch.tensor(example["input_ids"][:length])
            attention_mask[row, width - length :] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            **{text: [e[text] for e in examples] for text in TEXTS},
        }


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
