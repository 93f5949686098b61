"""Examples from JSON, JSON lines and Parquet files, or from the Hugging Face Hub."""

from __future__ import annotations

import functools
import glob
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torchmetrics import Metric

from milora_lightning.data.formats import AUTO, Fields, Format, Kind
from milora_lightning.data.records import SUFFIXES, read_records
from milora_lightning.data.rows import FORMAT, UNREAD, Convert, Row, checked_rows
from milora_lightning.data.sources import COLUMNS, PROMPT_COLUMNS, Split, cached_dataset
from milora_lightning.metrics import AnswerAccuracy, TaskAccuracy, right_answer

KINDS: dict[str, Kind] = {"messages": "conversations", "tools": "conversations", "text": "texts"}
"""Columns that only some kinds of formats have."""


class Files:
    """Examples from files or from the Hugging Face Hub.

    Each split is one of

    - a path, or a glob such as ``data/*.jsonl``, or a list of them: ``.json`` (an array of objects, or one object
      on each line), ``.jsonl`` or ``.parquet``;
    - a Hub name, ``org/name`` or ``org/name:config``: whatever is no file and has no such suffix.

    ``test`` may also be a mapping of names to such locations: several test sets, each with an accuracy of its own.

    What an example is, is recognised by the names of its fields (in whichever case), unless they are given:

    - a conversation: ``messages`` (OpenAI) or ``conversations`` (ShareGPT), with ``tools`` and ``system``;
    - a prompt and a response: ``instruction`` and ``output`` with ``input``, ``system`` and ``history`` (Alpaca);
      ``prompt`` and ``completion``, ``question`` and ``answer``, ``query`` and ``response``, ``problem`` and
      ``solution``, ``prompt`` and ``chosen``, in any combination. With a system message, a history or tools it is a
      conversation, as it is if the two are messages;
    - a text of which every token is learned: ``text``, where there is nothing else.

    A line says what was recognised. Where there are several possibilities, none is chosen, and a file whose rows are
    of several formats is refused.

    Every row is checked when it is read; numbers are taken as text, anything else that is no string is refused
    with its file and row. Fields that hold something and that nobody reads are named. What has been read is kept in
    the cache of ``datasets``.

    Args:
        train: Training data.
        validation: Validation data.
        test: Test data, or the test sets by name.
        prompt_field: Field with the instruction or question. ``"auto"`` recognises it, as described above; likewise
            for the other fields.
        response_field: Field with the text to learn.
        input_field: Field with further context, which may be empty or absent in single rows; None for none.
        reference_field: Field with what generated text is scored against; None for the response.
        train_split: Which split of a Hub data set to train on; slices such as ``"train[:90%]"`` work too.
        validation_split: Likewise for validation.
        test_split: Likewise for test.
        validation_size: How much of ``train`` to hold out where ``validation`` is None: a number of examples, or
            a fraction below 1.
        seed: Chooses the examples held out.
        messages_field: Field with a conversation, in the form of OpenAI or of ShareGPT.
        tools_field: Field with the tools of a conversation; None for none.
        system_field: Field with the system's message; None for none.
        text_field: Field with a text, of which every token is learned.

    Raises:
        FileNotFoundError: When loading, if a file does not exist or the Hub cannot provide the data.
        ValueError: When loading, if a file is malformed or empty, a row lacks a field or holds something other
            than text, or the held-out part is as large as the data.
    """

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
        validation_size: int | float = 0,
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
            **_settled(named),
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
            parts = [self._read(location, split, name) for name, location in self.test_sets.items()]
            return datasets.concatenate_datasets(parts)
        hold_out = bool(self.validation_size) and not self.locations["validation"] and split != "test"
        location = self.locations["train" if hold_out else split]
        if not location:
            return None
        dataset = self._read(location, split)
        return dataset.select(self._held_out(len(dataset), split)) if hold_out else dataset

    def metric(self) -> Metric | None:
        """Make the metric of generated answers, for each test set by itself if they have names."""
        return TaskAccuracy(dict.fromkeys(["", *self.test_sets], right_answer)) if self.test_sets else AnswerAccuracy()

    @staticmethod
    def convert(record: dict[str, Any]) -> dict[str, Any]:
        """Bring a record into other fields before they are read; for subclasses that know their data's formats."""
        return record

    def _read(self, location: str | list[str], split: Split, task: str = "") -> datasets.Dataset:
        names = [location] if isinstance(location, str) else location
        common: dict[str, Any] = {
            "columns": (*COLUMNS, *self.fields.keys() & {"prompt_role"}, UNREAD, FORMAT),
            "fields": self.fields,
            "convert": type(self).convert,
            "task": task,
        }
        if isinstance(location, str) and _is_hub_name(location):
            hub = _from_hub(location, self.hub_splits[split])
            dataset = cached_dataset(_hub_rows, dataset=hub, name=location, **common)
        else:
            # Size and time of change go into the cache's key, so that an edited file is read again.
            files = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for name in names for p in _paths(name))
            dataset = cached_dataset(_file_rows, files=files, **common)
        formats = [Format.read(note) for note in dataset.unique(FORMAT) if note]
        unread = {field: None for fields in dataset.unique(UNREAD) for field in json.loads(fields)}
        if formats or unread:
            self.say_read(", ".join(map(str, names)), len(dataset), formats, list(unread))
        kinds = {format.kind for format in formats} or {"prompts"}
        columns = [*PROMPT_COLUMNS, *self.fields.keys() & {"prompt_role"}]
        columns += [column for column, kind in KINDS.items() if kind in kinds]
        return dataset.select_columns(columns)

    def say_read(self, location: str, size: int, formats: list[Format], unread: list[str]) -> None:
        """Say what was recognised, and which fields hold something that is not read.

        Args:
            location: Where the data are.
            size: How many rows they have.
            formats: What was recognised; empty where all was named.
            unread: The fields, all of them from single rows at least.
        """
        words = "; or ".join(format.in_words(size) for format in formats or [Format("prompts", self.fields)])
        line = f"{location}: {words}."
        if unread:
            prompts = type(self).convert is Files.convert and all(format.kind == "prompts" for format in formats)
            remedy = f" (input_field={unread[0]} would use it, for one)" if prompts else ""
            line += f" Fields not read: {', '.join(map(repr, unread))}{remedy}."
        _say(line)

    def _held_out(self, size: int, split: Split) -> list[int]:
        held_out = self.validation_size if self.validation_size >= 1 else math.ceil(self.validation_size * size)
        if not 0 < held_out < size or held_out != int(held_out):
            raise ValueError(
                f"validation_size is {self.validation_size}, but must be a whole number below the {size} examples of "
                "train, or a fraction between 0 and 1."
            )
        order = np.random.default_rng(self.seed).permutation(size)
        chosen = order[: int(held_out)] if split == "validation" else order[int(held_out) :]
        return sorted(chosen.tolist())


def _settled(named: dict[str, str | None]) -> Fields:
    """Leave what is not named to be recognised, as far as it is not excluded by what is.

    Raises:
        ValueError: If what is named excludes one another.
    """
    kinds = {"prompt": "prompts", "response": "prompts", "messages": "conversations", "text": "texts"}
    given = {kinds[name] for name, field in named.items() if field not in (None, AUTO)}
    if len(given) > 1:
        names = ", ".join(f"{name}_field={field!r}" for name, field in named.items() if field not in (None, AUTO))
        raise ValueError(f"{names} name more than one place of an example. Give one, and leave the others out.")
    return {name: None if field == AUTO and given - {kinds[name]} else field for name, field in named.items()}


def _is_hub_name(name: str) -> bool:
    return not (Path(name).expanduser().exists() or name.endswith(SUFFIXES) or glob.has_magic(name))


def _paths(name: str) -> list[Path]:
    """Find the files of a path or glob."""
    path = Path(name).expanduser().absolute()
    try:
        return _found(name, path)
    except PermissionError as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Check the permissions of the file and its folder."
        ) from error


def _found(name: str, path: Path) -> list[Path]:
    found = [Path(p) for p in sorted(glob.glob(str(path)))] if not path.exists() and glob.has_magic(name) else [path]
    if not found or not found[0].exists():
        raise FileNotFoundError(f"There is no data file {path}. Check the path; a relative one starts at {Path.cwd()}.")
    for file in found:
        if not file.is_file() or file.suffix not in SUFFIXES:
            raise ValueError(
                f"{file} is no data file: its name has to end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}. "
                "Convert it, or name the files of a folder with a glob such as folder/*.jsonl."
            )
    return found


def _from_hub(name: str, split: str) -> datasets.Dataset:
    repository, _, config = name.partition(":")
    try:
        return datasets.load_dataset(repository, config or None, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"There is no file {Path(name).expanduser().absolute()}, and the Hugging Face Hub does not have the data "
            f"set {name!r} or cannot be reached. Check the name and the network, or give the path of a "
            f"{', '.join(SUFFIXES)} file. ({type(error).__name__}: {error})"
        ) from error
    except ValueError as error:  # no such split, or no such configuration
        raise ValueError(f"The data set {name!r} cannot be loaded with split={split!r}: {error}") from error


def _file_rows(files: tuple[tuple[str, int, int], ...], fields: Fields, convert: Convert, task: str) -> Iterator[Row]:
    for name, _, _ in files:
        yield from checked_rows(read_records(name), name, fields, convert, task)


def _hub_rows(dataset: datasets.Dataset, name: str, fields: Fields, convert: Convert, task: str) -> Iterator[Row]:
    yield from checked_rows(enumerate(dataset, 1), name, fields, convert, task)


@functools.cache  # once for train and the validation data held out of it
def _say(text: str) -> None:
    rank_zero_info(text)
