"""Examples from JSON, JSON lines and Parquet files, or from the Hugging Face Hub."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from torchmetrics import Metric

from milora_lightning.data.sources import Row, Split, cached_dataset
from milora_lightning.metrics import AnswerAccuracy, TaskAccuracy, right_answer

SUFFIXES = (".json", ".jsonl", ".parquet")
OPTIONAL = ("input", "task")
Fields = dict[str, "str | None"]
Convert = Callable[[dict[str, Any]], dict[str, Any]]


class Files:
    """Examples from files or from the Hugging Face Hub.

    Each split is one of

    - a path, or a glob such as ``data/*.jsonl``, or a list of them: ``.json`` (an array of objects, or one object
      on each line), ``.jsonl`` or ``.parquet``;
    - a Hub name, ``org/name`` or ``org/name:config``: whatever is no file and has no such suffix.

    ``test`` may also be a mapping of names to such locations: several test sets, each with an accuracy of its own.

    Every row is checked when it is read; numbers are taken as text, anything else that is no string is refused
    with its file and row. What has been read is kept in the cache of ``datasets``.

    Args:
        train: Training data.
        validation: Validation data.
        test: Test data, or the test sets by name.
        prompt_field: Field with the instruction or question.
        response_field: Field with the text to learn.
        input_field: Field with further context, which may be empty or absent in single rows; None for none.
        reference_field: Field with what generated text is scored against; None for the response.
        train_split: Which split of a Hub data set to train on; slices such as ``"train[:90%]"`` work too.
        validation_split: Likewise for validation.
        test_split: Likewise for test.
        validation_size: How much of ``train`` to hold out where ``validation`` is None: a number of examples, or
            a fraction below 1.
        seed: Chooses the examples held out.

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
        prompt_field: str = "instruction",
        response_field: str = "output",
        input_field: str | None = None,
        reference_field: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        validation_size: int | float = 0,
        seed: int = 0,
    ) -> None:
        self.test_sets = test if isinstance(test, dict) else {}
        self.locations = {"train": train, "validation": validation, "test": None if isinstance(test, dict) else test}
        self.fields: Fields = {
            "prompt": prompt_field,
            "input": input_field,
            "response": response_field,
            "reference": reference_field or response_field,
            "task": None,
        }
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
        common = {"fields": self.fields, "convert": type(self).convert, "task": task}
        if isinstance(location, str) and _is_hub_name(location):
            dataset = _from_hub(location, self.hub_splits[split])
            return cached_dataset(_hub_rows, dataset=dataset, name=location, **common)
        # Size and time of change go into the cache's key, so that an edited file is read again.
        files = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for name in names for p in _paths(name))
        return cached_dataset(_file_rows, files=files, **common)

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


def _is_hub_name(name: str) -> bool:
    return not (Path(name).expanduser().exists() or name.endswith(SUFFIXES) or glob.has_magic(name))


def _paths(name: str) -> list[Path]:
    """Find the files of a path or glob."""
    path = Path(name).expanduser().absolute()
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


def _file_rows(files: tuple[tuple[str, int, int], ...], fields: Fields, convert: Convert, task: str) -> Iterator[Row]:
    for name, _, _ in files:
        records = _parquet_records(name) if name.endswith(".parquet") else _json_records(name)
        yield from _checked_rows(records, name, fields, convert, task)


def _hub_rows(dataset: datasets.Dataset, name: str, fields: Fields, convert: Convert, task: str) -> Iterator[Row]:
    yield from _checked_rows(enumerate(dataset, 1), name, fields, convert, task)


def _checked_rows(
    records: Iterable[tuple[int, Any]], name: str, fields: Fields, convert: Convert, task: str
) -> Iterator[Row]:
    number = 0
    for number, record in records:
        where = f"row {number} (the first is row 1) of {name}"
        if not isinstance(record, dict):
            raise ValueError(f"In {where} there is no object with fields but {type(record).__name__}: {record!r:.80}.")
        try:
            converted = convert(record)
        except ValueError as error:
            raise ValueError(f"In {where}: {error}") from error
        row = _checked(converted, fields, where)
        yield {**row, "task": task or row["task"]}
    if number == 0:
        raise ValueError(f"There are no rows in {name}. Point to data that is not empty.")


def _parquet_records(name: str) -> Iterator[tuple[int, Any]]:

    try:
        batches = pa.parquet.ParquetFile(name).iter_batches()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name} is not a valid Parquet file ({error}). Write it anew.") from error
    yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)


def _json_records(name: str) -> Iterator[tuple[int, Any]]:
    """Read an array of objects, or one object on each line; in the latter case rows are lines."""
    line = 0
    try:
        with open(name, encoding="utf-8-sig") as file:
            is_array = file.read(1 << 16).lstrip().startswith("[")
            file.seek(0)
            if is_array:
                yield from enumerate(json.load(file), 1)
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name} is not valid JSON in line {line or error.lineno}, column {error.colno} ({error.msg}). Correct it; "
            "a file holds one array of objects, or one object on each line."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8 ({error}). Convert it.") from error


def _checked(record: dict[str, Any], fields: Fields, where: str) -> Row:
    """Take the texts of the columns out of a record."""
    row = {}
    for column, field in fields.items():
        if field is None or (column in OPTIONAL and record.get(field) is None):
            row[column] = ""
            continue
        if field not in record:
            raise ValueError(
                f"There is no field {field!r} in {where}; it has {sorted(record)}. Correct the row, or set "
                f"{column}_field to the right one."
            )
        value = record[field]
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (isinstance(value, str) or is_number):
            raise ValueError(
                f"The field {field!r} in {where} holds {value!r:.80} ({type(value).__name__}), which is no text. "
                "Correct or remove the row."
            )
        row[column] = str(value)
    return row
