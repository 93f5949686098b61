"""The part of the data module that loads and tokenizes the splits of a source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import datasets
from lightning.pytorch import LightningDataModule
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from milora_lightning.data.batches.images import with_their_images
from milora_lightning.data.columns import as_columns, as_dataset
from milora_lightning.data.encoding.prompt_format import PromptFormat, asking_suffix
from milora_lightning.data.encoding.templates import AUTO, TemplateName, asks_otherwise, name_of, with_template
from milora_lightning.data.kinds_of_rows import first_of_each, holds_questions, kinds_of
from milora_lightning.data.reading.rows import BEGINNING
from milora_lightning.data.sources import AsksLines, ShowsImages, Source, Split, Task, describe
from milora_lightning.data.streaming.rows import stream_of
from milora_lightning.data.tokenizing import tokenize_dataset
from milora_lightning.metrics import AnswerAccuracy
from milora_lightning.utils.errors import InvalidInputError

# The splits that each stage loads.
SPLITS: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
    None: ("train", "validation", "test"),
}


class TokenizedSplits(LightningDataModule):
    """Data module base class that tokenizes a source's examples.

    Args:
        source: Where examples come from; for details of all arguments see :class:`milora_lightning.SFTDataModule`.
        tokenizer: The model's name, or its tokenizer.
        template: How prompts and conversations are written.
        prompt_suffix: Text at the end of every prompt.
        generation_prompt_suffix: Text at the end of prompts to answer; None for ``prompt_suffix``.
        max_length: Maximum number of tokens in an example.
        num_proc: Number of processes that tokenize.
        train_on: Which turns of conversations are learned.
        train_on_inputs: Whether prompts are learned as well.
        streaming: Whether only the beginning of the training data is loaded.
        num_generation_examples: Number of validation examples to answer; None for all.
        num_test_generation_examples: Number of examples to answer in each test set; None for all.
        answer_by: How answers are chosen.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: str | PreTrainedTokenizerBase,
        template: str,
        prompt_suffix: str,
        generation_prompt_suffix: str | None,
        max_length: int,
        num_proc: int | None,
        train_on: str | list[str],
        train_on_inputs: bool,
        streaming: bool,
        num_generation_examples: int | None,
        num_test_generation_examples: int | None,
        answer_by: Literal["generation", "likelihood"],
    ) -> None:
        super().__init__()
        name_of(template, False)
        self.source = source
        self.tokenizer = tokenizer
        self.template = template
        self.prompt_suffix = prompt_suffix
        self.generation_prompt_suffix = generation_prompt_suffix
        self.max_length = max_length
        self.num_proc = num_proc
        self.train_on = train_on
        self.train_on_inputs = train_on_inputs
        self.streaming = streaming
        self.num_generation_examples = num_generation_examples
        self.num_test_generation_examples = num_test_generation_examples
        self.answer_by = answer_by
        self._splits: dict[Split, datasets.Dataset | None] = {}
        self._prompts: dict[Split, datasets.Dataset] = {}  # if they are formatted differently from training
        self._processor: ProcessorMixin | None = None
        self._unanswered: bool | None = None  # whether prompts without a response are in test; None without any
        self.kinds_of: tuple[bool, bool] | None = None  # whether there are conversations, and nothing but plain texts

    def metric(self) -> Metric | None:
        """Return the metric that scores answers, by default :class:`AnswerAccuracy`; None if the source scores none."""
        return self.source.metric() if isinstance(self.source, Task) else AnswerAccuracy()

    @property
    def description(self) -> str:
        """The source and its arguments in one line, for model cards."""
        return describe(self.source)

    @property
    def prompt_format(self) -> PromptFormat | None:
        """The format of prompts; None if all data are plain texts."""
        _, only_texts = self._kinds_of_rows()
        return None if only_texts else PromptFormat.of(self.tokenizer_object, self.template_name, *self._suffixes)

    def ask_as(self, trained: PromptFormat) -> None:
        """Use the prompt format of training if ``template`` is ``"auto"``, instead of letting the data decide.

        Args:
            trained: The format of training; its suffixes are used unless one is given here.
        """
        if self.template != AUTO:
            return
        if not self.prompt_suffix and self.generation_prompt_suffix is None:
            self.generation_prompt_suffix = trained.generation_prompt_suffix
        self.template, self.prompt_suffix = trained.template, self.prompt_suffix or trained.prompt_suffix
        if (jinja := trained.tokenizers_template) is not None:
            self.tokenizer = replace(trained, chat_template=jinja).applied_to(self.tokenizer_object)

    @property
    def template_name(self) -> TemplateName:
        """Name of the template, determined by the data if it is ``"auto"``."""
        return name_of(self.template, self._kinds_of_rows()[0] if self.template == AUTO else False)

    @property
    def template_in_words(self) -> str:
        """Name of the template for messages, with its origin if that is not clear from the name."""
        _, only_texts = self._kinds_of_rows()
        if only_texts:
            return "none, texts are learned unchanged"
        name = self.template_name
        if name == "chat" and self.template in ("chat", AUTO):
            return "chat (the tokenizer's own)"
        if self.template == AUTO:
            return f"{name}, for prompts and responses"
        return name if self.template == name else f"{name} ({self.template})"

    @property
    def tokenizer_object(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded if only the model's name was given."""
        if isinstance(self.tokenizer, str):
            if not self.tokenizer:
                raise InvalidInputError("SFTDataModule needs a tokenizer: pass the model's name, or the tokenizer.")
            from milora_lightning.models.pretrained import load_tokenizer

            self.tokenizer = load_tokenizer(self.tokenizer)
        self.tokenizer = with_template(self.tokenizer, self.template)
        return self.tokenizer

    @property
    def shows_images(self) -> bool:
        """Whether the source has rows with images."""
        return isinstance(self.source, ShowsImages) and self.source.shows_images

    @property
    def processor(self) -> ProcessorMixin:
        """The model's processor for images and texts."""
        if self._processor is None:
            from milora_lightning.models.pretrained import load_processor

            self._processor = load_processor(self.tokenizer_object.name_or_path)
        return self._processor

    def loaded(self, stage: str) -> list[Split]:
        """Return the splits of a stage that the source has."""
        return [split for split in SPLITS[stage] if self._splits.get(split) is not None]

    def answered(self, split: Split) -> Sequence[int]:
        """Return the indices of the examples that an evaluation answers, in addition to computing their loss."""
        number = {"validation": self.num_generation_examples, "test": self.num_test_generation_examples}.get(split, 0)
        if self.metric() is None or number == 0:
            return []
        examples = self.prompts(split)
        asked = [i for i, length in enumerate(examples["prompt_length"][:]) if length]  # plain texts have no prompt
        if number is None:
            return asked
        tasks = examples["task"][:]  # at once: each look at a column sets up a dataset
        return [asked[i] for i in first_of_each([tasks[i] for i in asked], number)]

    def examples(self, split: Split) -> datasets.Dataset:
        """Return the tokenized examples of a split.

        Raises:
            ValueError: If there is none, or it has not been loaded.
        """
        examples = self._splits.get(split)
        if examples is None:
            raise InvalidInputError(
                f"There is no {split} data. Set data.source.{split} to a file, a folder or a data set on the Hub"
                + ("." if split in self._splits else f", and call setup() for a stage that uses {split}.")
            )
        return examples

    def prompts(self, split: Split) -> datasets.Dataset:
        """Return the tokenized examples of a split with prompts in the format for answering.

        They are the same as those of :meth:`examples`, in the same order; but some templates, and
        ``generation_prompt_suffix``, format prompts to answer differently from training.

        Raises:
            ValueError: As for :meth:`examples`.
        """
        examples = self.examples(split)
        if not self._asks_otherwise:
            return examples
        if split not in self._prompts:
            unanswered = split == "test" and bool(self._unanswered)
            self._prompts[split] = cast(datasets.Dataset, self._tokenized(split, unanswered, asks=True))
        return self._prompts[split]

    @property
    def _asks_otherwise(self) -> bool:
        """Whether prompts to answer have different tokens from those of training."""
        return asking_suffix(*self._suffixes) != self.prompt_suffix or asks_otherwise(self.template_name)

    @property
    def _suffixes(self) -> tuple[str, str | None]:
        return self.prompt_suffix, self.generation_prompt_suffix

    def longest(self, split: Split) -> int:
        """Return the length of the longest example of a split in tokens; for a stream, the length allowed."""
        if self._is_stream(split):
            return self.max_length
        return int(max(self.examples(split)["length"][:]))

    def _is_stream(self, split: Split) -> bool:
        return self.streaming and split == "train"

    def _load(self, split: Split, unanswered: bool = False) -> Any:
        """Load a split; only the beginning of a training stream, and the lines of text files to answer."""
        if unanswered and isinstance(self.source, AsksLines) and (lines := self.source.lines()) is not None:
            return [{"prompt": line, "response": ""} for line in lines]
        if not self.streaming:
            return self.source.load(split)
        stream = stream_of(self.source, split)
        if stream is None:
            return None
        rows = list(itertools.islice(stream, BEGINNING if self._is_stream(split) else None))
        return datasets.Dataset.from_dict(as_columns(rows, range(len(rows)), split)) if rows else []

    def _tokenized(self, split: Split, unanswered: bool = False, asks: bool = False) -> datasets.Dataset | None:
        dataset = self._load(split, unanswered)
        if dataset is None:
            return None
        dataset = as_dataset(dataset, split)
        if self.kinds_of is None:
            self.kinds_of = kinds_of(dataset)
        if split == "test" and not asks:
            lines = isinstance(self.source, AsksLines) and self.source.lines() is not None
            self._unanswered = unanswered if lines or holds_questions(dataset) else None
        encoded = tokenize_dataset(
            dataset,
            self.tokenizer_object,
            self.template_name,
            asking_suffix(*self._suffixes) if asks else self.prompt_suffix,
            self.max_length,
            self.num_proc,
            f"beginning of the {split}" if self._is_stream(split) else split,
            self.train_on,
            unanswered,
            asks,
            self.train_on_inputs,
        )
        return with_their_images(encoded, self.processor, split) if self.shows_images else encoded

    def _kinds_of_rows(self) -> tuple[bool, bool]:
        """Return the kinds of rows in the first loaded split; if none has been loaded, load the first available one."""
        if self.kinds_of is None:
            data = ((split, self._load(split)) for split in SPLITS[None])
            found = next(((split, dataset) for split, dataset in data if dataset is not None), None)
            self.kinds_of = (False, False) if found is None else kinds_of(as_dataset(found[1], found[0]))
        return self.kinds_of
