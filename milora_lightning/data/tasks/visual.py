"""Visual instruction tuning in the format of LLaVA: conversations about images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from milora_lightning.data.locations import files_at
from milora_lightning.data.reading.conversations import as_json, read_conversation
from milora_lightning.data.reading.records import read_records
from milora_lightning.data.reading.rows import Row
from milora_lightning.data.sources import Split, cached_dataset
from milora_lightning.data.validation_size import held_out_examples
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError, MissingFileError

PLACEHOLDER = "<image>"
COLUMNS = ("messages", "image", "reference", "task")


class VisualInstructions:
    """Conversations about images, in LLaVA's JSON format.

    Each row has ``conversations`` (turns with ``from``, human or gpt, and ``value``), and ``image``, the path of an
    image in the folder ``images``; rows without it are conversations in text. The placeholder ``<image>`` stands in a
    question; as in LLaVA, it is moved to the beginning of that question. For ``predict``, rows may also be questions in
    the format of LLaVA's benchmarks: ``text`` with ``image`` and ``question_id``.

    Answers are neither right nor wrong here, so evaluations report only the loss; ``predict`` writes answers.

    Args:
        train: Training data: a JSON or JSONL file, or several.
        images: Folder that the paths of images are relative to.
        validation: Validation data; None to hold ``validation_size`` examples out of ``train``.
        test: Questions to answer, or conversations.
        validation_size: How much to hold out: a number of examples, or a fraction below 1.
        seed: Seed for choosing the examples held out.

    Raises:
        FileNotFoundError: When loading, if a file or an image does not exist.
        ValueError: When loading, if a row is malformed.
    """

    shows_images = True

    def __init__(
        self,
        train: str | list[str] | None = None,
        images: str = ".",
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        validation_size: int | float = 0,
        seed: int = 0,
    ) -> None:
        self.locations = {"train": train, "validation": validation, "test": test}
        self.images = images
        self.validation_size = validation_size
        self.seed = seed

    def load(self, split: Split) -> datasets.Dataset | None:
        """Load one split; None if it is not configured."""
        location = self.locations[split]
        held = split != "test" and self.locations["validation"] is None and self.validation_size
        if location is None and not (held and split == "validation"):
            return None
        location = self.locations["train"] if held else location
        if location is None:
            return None
        names = [location] if isinstance(location, str) else location
        paths = [path for name in names for path in files_at(name, split, True)]
        # Size and modification time are part of the cache's key, so that an edited file is read again.
        files = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
        dataset = cached_dataset(visual_rows, COLUMNS, files=files, images=str(Path(self.images).absolute()))
        if not held:
            return dataset
        number = held_out_examples(self.validation_size, len(dataset))
        order = np.random.default_rng(self.seed).permutation(len(dataset))
        chosen = order[:number] if split == "validation" else order[number:]
        return dataset.select(sorted(chosen.tolist()))

    def metric(self) -> None:
        """Return no metric: nothing is generated in evaluations."""


def visual_rows(files: tuple[tuple[str, int, int], ...], images: str) -> Iterator[Row]:
    """Read the rows of files, each given as path, size and modification time."""
    for name, _, _ in files:
        for number, record in read_records(name):
            where = f"row {number} of {name}"
            try:
                yield visual_row(record, Path(images))
            except MissingFileError as error:
                raise MissingFileError(f"In {where}: {error}") from error
            except MiLoRAError as error:
                raise InvalidInputError(f"In {where}: {error}") from error


def visual_row(record: Any, images: Path) -> Row:
    r"""Convert a record of LLaVA's format.

    Args:
        record: The record.
        images: The folder of the images.

    Raises:
        FileNotFoundError: If there is no such image.
        ValueError: If the record is malformed.

    >>> turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A cat."}]
    >>> visual_row({"conversations": turns}, Path("."))
    Traceback (most recent call last):
    milora_lightning.utils.errors.InvalidInputError: there are 1 placeholders <image> and no image: ...
    """
    if not isinstance(record, dict) or not record.keys() & {"conversations", "text"}:
        fields = sorted(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise InvalidInputError(f"there are neither conversations nor a text with a question: {fields}.")
    image = record.get("image") or ""
    if "conversations" in record:
        messages = read_conversation(record["conversations"], "conversations")
    else:
        text = str(record["text"])
        messages = [{"role": "user", "content": text if not image or PLACEHOLDER in text else f"{PLACEHOLDER}\n{text}"}]
    number = sum(message["content"].count(PLACEHOLDER) for message in messages)
    if number != bool(image):
        raise InvalidInputError(
            f"there are {number} placeholders {PLACEHOLDER} and {'one image' if image else 'no image'}: each image "
            "needs one, and more than one image is not supported."
        )
    for message in messages:
        if PLACEHOLDER in message["content"]:
            if message["role"] != "user":
                raise InvalidInputError(f"the placeholder {PLACEHOLDER} stands in what the {message['role']} says.")
            message["content"] = f"{PLACEHOLDER}\n{message['content'].replace(PLACEHOLDER, '').strip()}"
    path = images / image if image else None
    if path is not None and not path.is_file():
        raise MissingFileError(f"there is no image {str(path)!r}. Set data.source.images to the folder of the images.")
    task = str(record.get("question_id", ""))
    return {"messages": as_json(messages, "the conversation"), "image": str(path or ""), "reference": "", "task": task}
