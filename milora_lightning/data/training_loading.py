"""Data loaders for training: whole data sets and streams, in padded or shared rows."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from milora_lightning.data.batches.batching import Collator
from milora_lightning.data.batches.budget import Batches, OverfittingBudgetSampler, TokenBudgetSampler
from milora_lightning.data.batches.packing import PackedDataset, PackingCollator
from milora_lightning.data.batches.resuming import OverfittingSampler, ResumableSampler, Resumption
from milora_lightning.data.batches.sampling import ResumableDataLoader
from milora_lightning.data.encoding.templates import AUTO
from milora_lightning.data.model_check import language_model
from milora_lightning.data.shared_steps import SharedSteps
from milora_lightning.data.streaming.encoding import StreamEncoder
from milora_lightning.data.streaming.loading import StreamedBatches, StreamLoader
from milora_lightning.data.streaming.places import StreamPlaces
from milora_lightning.data.streaming.rows import stream_of
from milora_lightning.models.limits import embedding_rows
from milora_lightning.models.packed_rows import reason_to_mix
from milora_lightning.models.segments import skips_other_examples


class TrainingLoaders(SharedSteps):
    """Data module base class with the loaders of training.

    Attributes:
        packing: Whether several examples share each row of a batch.
        padding_free: Whether all examples of a batch are in one row; ``"auto"`` if the model's attention benefits.
        shuffle_buffer: Number of records of a stream in memory at a time.
        group_by_length: Whether the examples of a batch have similar lengths.
    """

    packing: bool
    padding_free: bool | Literal["auto"]
    shuffle_buffer: int
    group_by_length: bool
    _resumption: Resumption
    _places: StreamPlaces

    def train_dataloader(self) -> DataLoader[Any] | StreamLoader:
        """Return training batches, shuffled in each epoch and, by default, grouped by length."""
        self._check_model()
        self.check_accumulated()
        return self._stream_loader() if self.streaming else self.epoch()

    def epoch(self) -> DataLoader[Any]:
        """Return batches of the loaded training examples; for a stream, these are from its beginning."""
        examples = self.examples("train")
        # Without the text columns, which are needed only for generation.
        rows: Any = examples.select_columns(["input_ids", "spans", *(["image"] if self.shows_images else [])])
        lengths = examples["length"][:]
        if self.packing:
            rows = PackedDataset(rows, lengths, self.max_length, self.seed)
            lengths = rows.lengths
        order: dict[str, Any] = {"shuffle": True, "seed": self.seed, **self._rank()}
        overfits, collator = self._overfits(), self._training_collator()
        if (most := self.max_tokens_per_batch) is not None:
            by_tokens = OverfittingBudgetSampler if overfits else TokenBudgetSampler
            grouped = by_tokens(
                self._resumption, lengths, most, not self.has_one_row(), self.pad_to_multiple_of, **order
            )
            return self._loader(Batches(rows), grouped, None, collator, ResumableDataLoader)
        step = self.counted_step(None if self.streaming else len(lengths))
        kind = OverfittingSampler if overfits else ResumableSampler
        grouping: dict[str, Any] = {"group_by_length": self.group_by_length, "group": self.global_batch_size}
        sampler = kind(self._resumption, lengths, step.examples, **order, **grouping)
        return self._loader(rows, sampler, step.examples, collator, ResumableDataLoader)

    def sample_batches(self, number: int) -> list[Any]:
        """Return padded batches of randomly chosen training examples, without affecting the order of training.

        They are the same on every rank and in every run, whatever its seed. For a stream, they are from its beginning.

        Args:
            number: Number of batches of ``batch_size`` examples; fewer if there are not enough examples.
        """
        examples = self.examples("train")
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
        lengths = examples["length"][:]
        # For little padding.
        chosen = sorted(order[: number * self.batch_size].tolist(), key=lambda index: lengths[index])
        rows: Any = examples.select_columns(["input_ids", "spans", *(["image"] if self.shows_images else [])])
        collate = self._collator(Collator)
        starts = range(0, len(chosen), self.batch_size)
        return [collate([rows[index] for index in chosen[i : i + self.batch_size]]) for i in starts]

    def _stream_loader(self) -> StreamLoader:
        """Return a loader with as many batches of the stream as the run takes."""
        stream = stream_of(self.source, "train")
        assert stream is not None  # its beginning has been read in setup
        module = getattr(self.trainer, "lightning_module", None)
        model = None if module is None else language_model(module)
        conversations, only_texts = self._kinds_of_rows()
        encoder = StreamEncoder(
            self.tokenizer_object,
            self.template_name,
            self.prompt_suffix,
            self.max_length,
            self.train_on,
            self.train_on_inputs,
            conversations=conversations or self.template != AUTO,
            only_texts=only_texts,
            passed=getattr(stream, "skipped", 0),
            embeddings=None if model is None else embedding_rows(model),
        )
        step = self.counted_step(None)
        batches = StreamedBatches(
            stream,
            encoder,
            self._training_collator(),
            self.shuffle_buffer,
            step.examples,
            self.max_length if self.packing else None,
            self.seed,
            group_by_length=self.group_by_length,
            **self._rank(),
            group=self.global_batch_size,
        )
        steps = self.trainer.max_steps if self.trainer else sys.maxsize
        return StreamLoader(batches, self._places, self.num_workers, steps * step.accumulated)

    # ---- Rows that examples share ----

    def has_one_row(self) -> bool:
        """Return whether all examples of a training batch are in one row."""
        if self.padding_free != "auto":
            return self.padding_free
        if self.shows_images:
            return False
        module = getattr(self.trainer, "lightning_module", None)
        model = language_model(module) if module is not None and getattr(module, "takes_one_row", False) else None
        return model is not None and skips_other_examples(model) and reason_to_mix(model) is None

    def remedy_for_shared_rows(self) -> str | None:
        """Return what to set if a model cannot keep the examples of a row apart; None if examples do not share rows."""
        if self.packing:
            return "set data.packing to false"
        return "set data.padding_free to false" if self.has_one_row() else None

    def _training_collator(self) -> Any:
        one_row = self.has_one_row()
        if one_row and self.padding_free == "auto":
            self.say("Batches: all examples in one row, without padding; the model's attention skips what is between.")
        kind = partial(PackingCollator, one_row=one_row) if one_row or self.packing else Collator
        return self._collator(kind)
