"""Data loaders for validation, test and prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from milora_lightning.data.batches.batching import Collator, PaddedDataset, PromptCollator
from milora_lightning.data.batches.choices import ChoiceCollator
from milora_lightning.data.batches.images import ImageCollator
from milora_lightning.data.batches.sampling import EvaluationSampler
from milora_lightning.data.encoding.chat import ChatTemplate
from milora_lightning.data.model_check import check_model
from milora_lightning.data.sources import MultipleChoice, Split
from milora_lightning.data.splits import TokenizedSplits
from milora_lightning.data.tokenizing import padding_id
from milora_lightning.utils.errors import InvalidInputError


class EvaluationLoaders(TokenizedSplits):
    """Data module base class with the loaders of validation, test and prediction, and helpers for all loaders.

    Attributes:
        eval_batch_size: Examples per rank and batch.
        generation_batch_size: Prompts per rank and batch to generate from.
        pad_to_multiple_of: Batch lengths are rounded up to a multiple of this.
        num_workers: Number of processes that load batches.
        seed: Seed of the training order.
        planned_devices: Number of devices if there is no Trainer, to preview the batches of a planned run.
    """

    planned_devices = 1
    eval_batch_size: int
    generation_batch_size: int
    pad_to_multiple_of: int
    num_workers: int
    seed: int

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return the loss batches and the generation batches of validation; an empty list if there is no such split."""
        if self._splits.get("validation") is None:
            return []
        return self._evaluation_loaders("validation")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return the loss batches and the generation batches of test."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return generation batches of all test examples in order."""
        with_prompt = [i for i, length in enumerate(self.prompts("test")["prompt_length"][:]) if length]
        if not with_prompt:
            raise InvalidInputError(
                "There is nothing to answer in the test data: they are texts without prompts. Give rows with a prompt, "
                "or a .txt file with a prompt in each line."
            )
        self._check_model()
        return self._generation_loader("test", with_prompt)

    def _check_model(self) -> None:
        """Check the Trainer's module against the data; :class:`CausalLMModule` repeats this once its model is built."""
        module = getattr(self.trainer, "lightning_module", None)
        if module is not None:
            check_model(self, module, self.pad_to_multiple_of)

    def _evaluation_loaders(self, split: Split) -> list[DataLoader[Any]]:
        self._check_model()
        examples = self.examples(split)
        indices: Sequence[int] = range(len(examples))
        order = indices if self._overfits() else _longest_first(indices, examples["length"][:])
        sampler = EvaluationSampler(order, **self._rank())
        loaders = [self._loader(PaddedDataset(examples), sampler, self.eval_batch_size, self._collator(Collator))]
        answered = self.answered(split)
        if answered:
            by_length = _longest_first(answered, self.prompts(split)["prompt_length"][:])
            loaders.append(self._generation_loader(split, answered if self._overfits() else by_length))
        return loaders

    def _generation_loader(self, split: Split, indices: Sequence[int]) -> DataLoader[Any]:
        sampler = EvaluationSampler(indices, **self._rank())
        examples = PaddedDataset(self.prompts(split))
        collator: Any = self._collator(PromptCollator)
        if self.answer_by == "likelihood":
            choices = cast(MultipleChoice, self.source).choices
            chat = ChatTemplate.of(self.tokenizer_object) if self.template_name == "chat" else None
            collator = ChoiceCollator(self.tokenizer_object, choices, self.pad_to_multiple_of, chat)
        return self._loader(examples, sampler, self.generation_batch_size, collator)

    def _collator(self, kind: Callable[[int, int], Any]) -> Any:
        collator = kind(padding_id(self.tokenizer_object), self.pad_to_multiple_of)
        return ImageCollator(collator, self.processor) if self.shows_images else collator

    def _loader(
        self,
        examples: Any,
        sampler: Any,
        batch_size: int | None,
        collator: Any,
        loader: type[DataLoader[Any]] = DataLoader,
    ) -> DataLoader[Any]:
        return loader(
            examples,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collator,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A separate generator: an evaluation must not draw from the global one, which training's dropout uses.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _overfits(self) -> bool:
        """Return whether ``overfit_batches`` is set; then the first batches are the data in the given order."""
        return bool(getattr(self.trainer, "overfit_batches", 0))

    def _rank(self) -> dict[str, int]:
        """Return the number of data-parallel replicas and this rank's index; tensor-parallel ranks share batches."""
        planned = {"num_replicas": self.planned_devices, "rank": 0}
        return getattr(self.trainer, "distributed_sampler_kwargs", None) or planned


def _longest_first(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Sort examples by length, to reduce padding and so that running out of memory happens immediately.

    >>> _longest_first([0, 1, 3], [5, 7, 9, 6])
    [1, 3, 0]
    """
    return sorted(indices, key=lambda i: -lengths[i])
