"""Conversion of what sources return into datasets whose columns are text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import datasets
from datasets.fingerprint import Hasher

from milora_lightning.data.code_key import code_key
from milora_lightning.data.reading.conversations import as_json, read_conversation, read_tools
from milora_lightning.data.reading.values import as_text
from milora_lightning.data.sources import COLUMNS
from milora_lightning.utils.compat.datasets import fingerprint_of
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError

NEEDED = ("prompt", "response")
OTHER_KINDS = ("messages", "text")  # either of them replaces prompt and response


def as_dataset(data: Any, split: str) -> datasets.Dataset:
    """Convert what a source returned into a dataset of text columns.

    Args:
        data: A dataset, or a list of dicts.
        split: Name of the split, for messages.

    Returns:
        A dataset with the columns ``prompt`` and ``response``, and the other ``COLUMNS`` that the data have, all of
        them text: numbers are written out, messages and tools are JSON, and missing values are empty. Each row has a
        prompt and a response, or messages, or a text.

    Raises:
        ValueError: If it is something else, a needed column is missing, a value is not text, or there are no rows.
    """
    if isinstance(data, list | tuple) and all(isinstance(row, dict) for row in data):
        names = dict.fromkeys(name for row in data for name in row)
        dataset = None
    elif isinstance(data, datasets.Dataset):
        dataset = data.with_format(None) if data.format["type"] else data
        names = dict.fromkeys(dataset.column_names)
    else:
        raise InvalidInputError(
            f"The source returns {_kind(data)} for {split}; it must return a datasets.Dataset{_alternative(data)}."
        )
    if len(data) or dataset is not None:
        _check_needed(names, split)
    if len(data) == 0:
        raise InvalidInputError(f"The {split} data has no rows. Point the source at data, or leave this split out.")
    columns = [name for name in COLUMNS if name in names or name in NEEDED]
    features = datasets.Features({name: datasets.Value("large_string") for name in columns})
    if dataset is None:
        rows = _texts({name: [row.get(name) for row in data] for name in names}, range(len(data)), split)
        return datasets.Dataset.from_dict(rows, features=features)
    if all(name in names and _is_text(dataset, name) for name in columns):
        return dataset
    return dataset.map(
        _texts,
        batched=True,
        with_indices=True,
        fn_kwargs={"split": split},
        remove_columns=[name for name in names if name not in columns],
        features=features,
        new_fingerprint=Hasher.hash([fingerprint_of(dataset), columns, code_key(_texts)]),
    )


def as_columns(rows: Sequence[dict[str, Any]], indices: Sequence[int], split: str) -> dict[str, list[str]]:
    """Convert rows of a stream into columns of text, as :func:`as_dataset` does for whole data sets.

    Args:
        rows: The rows, at least one.
        indices: Indices of these rows in the data, for messages.
        split: Name of the split, for messages.

    Raises:
        ValueError: As for :func:`as_dataset`.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    _check_needed(names, split)
    batch = {name: [row.get(name) for row in rows] for name in names}
    if all(name in names and all(type(value) is str for value in batch[name]) for name in NEEDED):
        others = [name for name in COLUMNS if name in names and name not in NEEDED]
        if all(type(value) is str for name in others for value in batch[name]):
            return cast("dict[str, list[str]]", batch)
    return _texts(batch, indices, split)


def _check_needed(names: dict[str, None], split: str) -> None:
    missing = [name for name in NEEDED if name not in names]
    if len(missing) == len(NEEDED) and any(name in names for name in OTHER_KINDS):
        return
    if missing:
        raise InvalidInputError(
            f"The {split} data has no column {' and no column '.join(map(repr, missing))}, only {list(names)}. "
            "A source must return the columns 'prompt' and 'response', or 'messages', or 'text'."
        )


def _is_text(dataset: datasets.Dataset, name: str) -> bool:
    kind = dataset.features[name]
    return getattr(kind, "dtype", None) in ("string", "large_string") and not dataset.data.column(name).null_count


def _texts(batch: dict[str, list[Any]], indices: Sequence[int], split: str) -> dict[str, list[str]]:
    """Convert a batch of values to text."""
    kinds = [batch[name] for name in OTHER_KINDS if name in batch]
    other = [any(values) for values in zip(*kinds, strict=True)] if kinds else [False] * len(indices)
    nothing = [None] * len(indices)
    return {
        name: [
            ""
            if value is None and (name not in NEEDED or other[i])
            else _text(name, value, f"The column {name!r} in row {index + 1} (the first is row 1) of the {split} data")
            for i, (index, value) in enumerate(zip(indices, batch.get(name, nothing), strict=True))
        ]
        for name in COLUMNS
        if name in batch or name in NEEDED
    }


def _text(name: str, value: Any, what: str) -> str:
    if name == "messages" and value != "":
        try:
            return as_json(read_conversation(value, name), what)
        except MiLoRAError as error:
            raise InvalidInputError(f"{what} is not a conversation: {error}") from error
    if name == "tools":
        return read_tools(value, name)
    return as_text(value, what)


def _kind(data: Any) -> str:
    if isinstance(data, dict):
        return f"{type(data).__name__} of {list(data)}"
    return f"an object of type {type(data).__name__}"


def _alternative(data: Any) -> str:
    if isinstance(data, datasets.DatasetDict) and data:
        return f": one of these, data[{next(iter(data))!r}] for example"
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        return ", which has all rows at hand. To train on a stream, set data.streaming: true"
    return " or a list of dicts"
