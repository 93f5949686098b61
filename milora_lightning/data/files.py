"""A source of examples from files in common formats, saved data sets, or the Hugging Face Hub."""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from typing import Any, Literal

import datasets
import numpy as np
from torchmetrics import Metric

from milora_lightning.data.copies import trained_copies
from milora_lightning.data.reading.formats import AUTO, Fields, Format, Kind, settled
from milora_lightning.data.reading.opening import kind_of
from milora_lightning.data.reading.rows import BEGINNING, FORMAT, UNREAD
from milora_lightning.data.row_readers import OpenRows, formats_of, kept_rows_at, prompt_lines, rows_at
from milora_lightning.data.sources import COLUMNS, PROMPT_COLUMNS, Source, Split
from milora_lightning.data.streaming.rows import RowStream
from milora_lightning.data.validation_size import held_out_examples, held_out_rows
from milora_lightning.metrics import AnswerAccuracy, TaskAccuracy, right_answer
from milora_lightning.utils.messages import inform, warn

KINDS: dict[str, Kind] = {"messages": "conversations", "tools": "conversations", "text": "texts"}
"""The kind of format of each column that not all formats have."""


class Files(Source):
    """Examples from files or from the Hugging Face Hub.

    Each split is one of

    - a file: ``.json`` (an array of objects, or one object per line), ``.jsonl``, ``.csv``, ``.tsv`` or ``.txt``,
      also compressed (followed by ``.gz``, ``.bz2``, ``.xz`` or ``.zst``), ``.parquet`` or ``.arrow``;
    - a folder of such files, whose names indicate their splits if there are several (``train``, ``validation``,
      ``test`` and other common words), or a glob such as ``data/*.jsonl``;
    - a folder that ``save_to_disk`` wrote;
    - a Hub name, ``org/name`` or ``org/name:config``: anything that is not a file and has none of these suffixes;
    - a list of any of these.

    ``train_split`` etc. name the splits of a data set. If ``test`` is None, the test split next to the training data
    is used, if there is one.

    ``test`` may also map names to locations: several test sets, each with its own accuracy.

    The format of examples is recognised by the names of their fields (ignoring case), unless the fields are given:

    - a conversation: ``messages`` (OpenAI) or ``conversations`` (ShareGPT), with ``tools`` and ``system``;
    - a prompt and a response: ``instruction`` and ``output`` with ``input``, ``system`` and ``history`` (Alpaca);
      ``prompt`` and ``completion``, ``question`` and ``answer``, ``query`` and ``response``, ``problem`` and
      ``solution``, ``prompt`` and ``chosen``, in any combination. With a system message, a history or tools it is a
      conversation, and also if prompt and response are messages;
    - a text of which every token is learned: ``text``, if there is nothing else.

    A logged line reports what was recognised. Ambiguous fields, and files with rows of several formats, are refused.

    Every row is checked when it is read. Numbers are converted to text; any other value that is not a string is
    refused with its file and row. Non-empty fields that are not read are reported. Rows that have been read are kept
    in the cache of ``datasets``.

    Args:
        train: Training data.
        validation: Validation data.
        test: Test data, or the test sets by name.
        prompt_field: Field with the instruction or question. ``"auto"`` recognises it as described above; this holds
            for the other fields, too.
        response_field: Field with the text to learn.
        input_field: Field with further context, which may be empty or absent in some rows; None for none.
        reference_field: Field that generated text is scored against; None for the response.
        train_split: Name of the training split in a data set. A slice, such as ``"train[:1000]"`` or ``"train[:90%]"``,
            takes a part of it, also for files.
        validation_split: The same for validation.
        test_split: The same for test.
        validation_size: How much of ``train`` to hold out if ``validation`` is None: a number of examples, or a
            fraction below 1; 0 for nothing. ``"auto"`` uses the validation split next to the training data; if there
            is none, it holds out a twentieth, at most 500 examples, and nothing if there are fewer than 20.
        seed: Seed for choosing the examples held out.
        messages_field: Field with a conversation in the form of OpenAI or ShareGPT.
        tools_field: Field with the tools of a conversation; None for none.
        system_field: Field with the system message; None for none.
        text_field: Field with a text of which every token is learned.

    Raises:
        FileNotFoundError: When loading, if a file does not exist or the Hub cannot provide the data.
        ValueError: When loading, if a file is malformed or empty, a row lacks a field or holds something other
            than text, or the held-out part is as large as the data.
    """

    takes_splits_beside = True
    """Whether to look for missing splits next to the training data; tasks define their splits themselves."""

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: dict[str, str | list[str]] | str | list[str] | None = None,
        prompt_field: str = AUTO,
        response_field: str = AUTO,
        input_field: str | None = AUTO,
        reference_field: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        validation_size: int | float | Literal["auto"] = AUTO,
        seed: int = 0,
        messages_field: str | None = AUTO,
        tools_field: str | None = AUTO,
        system_field: str | None = AUTO,
        text_field: str | None = AUTO,
    ) -> None:
        self.test_sets = test if isinstance(test, dict) else {}
        self.locations = {"train": train, "validation": validation, "test": None if isinstance(test, dict) else test}
        named = {"prompt": prompt_field, "response": response_field, "messages": messages_field, "text": text_field}
        self.fields: Fields = {
            **settled(named),
            "input": input_field,
            "reference": reference_field,
            "task": None,
            "tools": tools_field,
            "system": system_field,
        }
        if prompt_field != AUTO and response_field != AUTO:
            if input_field == AUTO:
                self.fields["input"] = "input" if prompt_field == "instruction" else None
            self.fields.update({name: None for name in ("tools", "system") if self.fields[name] == AUTO})
        else:
            self.fields["history"] = AUTO
        self.hub_splits = {"train": train_split, "validation": validation_split, "test": test_split}
        self.validation_size = validation_size
        self.seed = seed

    def load(self, split: Split) -> datasets.Dataset | None:
        """Load one split; None if it is not configured."""
        if split == "test" and self.test_sets:
            parts = (self._read(location, split, name) for name, location in self.test_sets.items())
            return datasets.concatenate_datasets([part for part in parts if part is not None])
        train, location = self.locations["train"], self.locations[split]
        if location and (split != "train" or self.locations["validation"]):
            return self._read(location, split)
        beside = None if not train or split == "train" else self._beside(train, split)
        if not train or beside is not None or split == "test":
            return beside
        dataset = self._read(train, "train")
        assert dataset is not None  # the training split is required
        held_out = held_out_examples(self.validation_size, len(dataset))
        if not held_out or self._beside(train, "validation") is not None:
            if split == "validation" and self.validation_size == AUTO and not held_out:
                _say(
                    f"{_joined(train)}: none of so few rows ({len(dataset)}) is held out, so there is no validation "
                    "loss. Set validation_size: 2 for two of them."
                )
            return dataset if split == "train" else None
        if self.validation_size == AUTO:
            _say(
                f"{_joined(train)}: {held_out} of {len(dataset)} rows are held out for validation. Set "
                "validation_size: 0 to train on all."
            )
        order = np.random.default_rng(self.seed).permutation(len(dataset))
        if split == "validation" and (copies := trained_copies(dataset, order[:held_out].tolist())):
            warn(
                f"{_joined(train)}: {copies} of the {held_out} rows held out are trained on, too, because "
                "there are copies of them: the validation loss says less of other data. Take the copies out."
            )
        chosen = order[:held_out] if split == "validation" else order[held_out:]
        return dataset.select(sorted(chosen.tolist()))

    def stream(self, split: Split) -> RowStream | None:
        """Return one split as a stream, for ``data.streaming``; None if it is not configured.

        If ``validation`` is None and ``validation_size`` is a number, the first rows of ``train`` are the validation
        data.

        Raises:
            ValueError: If ``validation_size`` is a fraction, since the length of a stream is not known.
        """
        if split == "test" and self.test_sets:
            sets = [self._rows_at(location, split, name) for name, location in self.test_sets.items()]
            return RowStream([part for parts in sets for part in parts])
        train, location = self.locations["train"], self.locations[split]
        size = self.validation_size
        if location and split != "train":
            return RowStream(self._rows_at(location, split))
        if not train:
            return None
        held_out = 0 if self.locations["validation"] else held_out_rows(size)
        if split == "train":
            return RowStream(self._rows_at(train, split)).skip(held_out)
        if split == "validation" and held_out:
            return RowStream(self._rows_at(train, "train")).take(held_out)
        beside = self.takes_splits_beside and (split == "test" or size == AUTO)
        parts = self._rows_at(train, split, needed=False) if beside else []
        if not parts and split == "validation" and size == AUTO:
            _say(
                f"{_joined(train)}: nothing is held out of the stream for validation. Set validation_size: 500 for its "
                "first 500 rows."
            )
        return RowStream(parts) if parts else None

    def lines(self) -> list[str] | None:
        """Return the lines of ``test`` for ``predict`` to answer, if it consists of text files; None otherwise."""
        location = self.locations["test"]
        names = [location] if isinstance(location, str) else location or []
        return prompt_lines(names) if names and all(kind_of(name) == ".txt" for name in names) else None

    def metric(self) -> Metric | None:
        """Return the metric of generated answers, with a separate accuracy for each named test set."""
        return TaskAccuracy(dict.fromkeys(["", *self.test_sets], right_answer)) if self.test_sets else AnswerAccuracy()

    @staticmethod
    def convert(record: dict[str, Any]) -> dict[str, Any]:
        """Convert a record before its fields are read; subclasses override it for the formats of their data."""
        return record

    def _beside(self, train: str | list[str], split: Split) -> datasets.Dataset | None:
        """Read a split next to the training data; None if there is none or it should not be used."""
        unwanted = split == "validation" and self.validation_size != AUTO
        if unwanted or not self.takes_splits_beside:
            return None
        return self._read(train, split, needed=False)

    def _read(
        self, location: str | list[str], split: Split, task: str = "", needed: bool = True
    ) -> datasets.Dataset | None:
        """Read a split at a location; None if it has no such split and ``needed`` is false."""
        names = [location] if isinstance(location, str) else location
        parts = [part for name in names if (part := self._part(name, split, task, needed)) is not None]
        if not parts:
            return None
        dataset = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
        kinds = {format.kind for format, _ in formats_of(dataset)} or {"prompts"}
        columns = [*PROMPT_COLUMNS, *self.fields.keys() & {"prompt_role"}]
        columns += [column for column, kind in KINDS.items() if kind in kinds]
        return dataset.select_columns(columns)

    def _reading(self, split: Split, task: str) -> dict[str, Any]:
        """Return the options for converting records to rows."""
        return {
            "fields": self.fields,
            "convert": type(self).convert,
            "task": task,
            "unanswered": split == "test",  # predict answers prompts without a response
        }

    @property
    def _columns(self) -> tuple[str, ...]:
        return (*COLUMNS, *self.fields.keys() & {"prompt_role"}, UNREAD, FORMAT)

    def _rows_at(self, location: str | list[str], split: Split, task: str = "", needed: bool = True) -> list[OpenRows]:
        """Return the openers of all rows at a location, and report the format of the first rows."""
        parts: list[OpenRows] = []
        for name in [location] if isinstance(location, str) else location:
            reading, split_name = self._reading(split, task), self.hub_splits[split]
            found = rows_at(name, split, split_name, needed, columns=self._columns, **reading)
            rows = list(itertools.islice(RowStream(found), BEGINNING))
            if rows:
                formats = Counter(row[FORMAT] for row in rows if row[FORMAT])
                unread = {field: None for row in rows for field in json.loads(row[UNREAD])}
                known = [(Format.read(note), size) for note, size in formats.items()]
                self.say_read(f"{name}, the beginning of a stream", known, list(unread))
            parts += found
        return parts

    def _part(self, name: str, split: Split, task: str, needed: bool) -> datasets.Dataset | None:
        common: dict[str, Any] = {"columns": self._columns, **self._reading(split, task)}
        dataset = kept_rows_at(name, split, self.hub_splits[split], needed, **common)
        if dataset is None:
            return None
        unread = {field: None for fields in dataset.unique(UNREAD) for field in json.loads(fields)}
        formats = formats_of(dataset)
        if formats or unread:
            self.say_read(name, formats or [(Format("prompts", self.fields), len(dataset))], list(unread))
        return dataset

    def say_read(self, location: str, formats: list[tuple[Format, int]], unread: list[str]) -> None:
        """Report the formats that were read, and the non-empty fields that were not.

        Args:
            location: Where the data are.
            formats: The formats, each with its number of rows.
            unread: The fields that are not empty in at least one row and were not read.
        """
        line = f"{location}: {'; '.join(format.in_words(size) for format, size in formats)}."
        if unread:
            prompts = type(self).convert is Files.convert and all(format.kind == "prompts" for format, _ in formats)
            remedy = f" (input_field={unread[0]} would use it, for one)" if prompts else ""
            line += f" Fields not read: {', '.join(map(repr, unread))}{remedy}."
        _say(line)


def _joined(location: str | list[str]) -> str:
    return location if isinstance(location, str) else ", ".join(location)


@functools.cache  # once for train and the validation data held out of it
def _say(text: str) -> None:
    inform(text)
