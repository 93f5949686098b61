"""Protocols for sources of examples, and the cache of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import datasets
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from torchmetrics import Metric

from milora_lightning.data.code_key import code_key
from milora_lightning.data.reading.rows import Row
from milora_lightning.utils.compat.datasets import fingerprint_of

Split = Literal["train", "validation", "test"]
PROMPT_COLUMNS = ("prompt", "input", "response", "reference", "task")
COLUMNS = (*PROMPT_COLUMNS, "messages", "tools", "text", "image")
"""Columns of an example. It is a prompt with a response, or ``messages`` in JSON with ``tools``, or a ``text``; the
columns of the other two kinds are empty. ``image`` is the path of the image that the prompt or a message shows."""


class Source(Protocol):
    """Anything that loads examples, such as :class:`Files` and :class:`WordProblems`.

    A custom source is a class with this one method.
    """

    def load(self, split: Split) -> datasets.Dataset | None:
        """Load one split.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.

        Returns:
            A dataset, or a list of dicts, with the columns ``prompt`` (question or instruction) and ``response`` (what
            the model should write), and optionally ``input`` (further context, may be empty), ``reference`` (what
            generated text is scored against, by default the response), ``task`` (the name of the test set, if there
            are several) and ``prompt_role`` (``"system"`` if the prompt is a chat's system message and the input is
            the user's message). Instead of prompt and response, a row may have ``messages`` (a conversation in
            OpenAI's form, as a list of dicts or as JSON) with ``tools``, or a ``text`` of which every token is
            learned. None if the source has no such split.
        """
        ...


@runtime_checkable
class Task(Source, Protocol):
    """A source that also defines how answers are scored."""

    def metric(self) -> Metric | None:
        """Return the metric of generated answers; None if answers are neither right nor wrong."""
        ...


@runtime_checkable
class MultipleChoice(Task, Protocol):
    """A task whose answers can also be chosen by their likelihood."""

    def choices(self, prompt: str) -> list[str]:
        """Return the possible responses to a prompt."""
        ...


@runtime_checkable
class ChecksTest(Task, Protocol):
    """A task that may refuse to be tested, for a reason that concerns the user."""

    def check_test(self) -> None:
        """Raise an error if answers to the test data cannot be scored."""
        ...


@runtime_checkable
class ShowsImages(Source, Protocol):
    """A source whose rows may have an ``image``; the text then contains one image placeholder of the model."""

    shows_images: bool


@runtime_checkable
class AsksLines(Source, Protocol):
    """A source whose test data may be text files with one prompt per line, for ``predict`` to answer."""

    def lines(self) -> list[str] | None:
        """Return the lines to answer; None if the test data are not text files."""
        ...


def cached_dataset(
    rows: Callable[..., Iterator[Row]], columns: tuple[str, ...] = PROMPT_COLUMNS, **arguments: Any
) -> datasets.Dataset:
    """Write rows to the cache of ``datasets`` once, and read them memory-mapped from then on.

    Args:
        rows: Module-level generator function of rows with the keys ``prompt``, ``input``, ``response``,
            ``reference``, and ``task`` if there are several.
        columns: Names of the columns, all of them text.
        arguments: Arguments of ``rows``. The cache's key consists of them, the code of ``rows``, and the code of
            functions among them.

    Returns:
        The dataset, with a fingerprint that is the same every time.

    Raises:
        Exception: Whatever ``rows`` raises.
    """
    functions = [rows, *filter(callable, arguments.values())]
    # A dataset among the arguments is represented by its fingerprint.
    values = {
        k: fingerprint_of(v) if isinstance(v, datasets.Dataset) else v for k, v in arguments.items() if not callable(v)
    }
    with progress_bars(False):
        try:
            return datasets.Dataset.from_generator(
                _Rows(rows, arguments, columns, Hasher.hash([code_key(*functions), values, columns])),
                features=datasets.Features({name: datasets.Value("large_string") for name in columns}),
            )
        except DatasetGenerationError as error:
            # The cause explains the failure; "An error occurred while generating" only hides it.
            raise (error.__cause__ or error) from None


class _Rows:
    """A generator of rows that is pickled as just its key, because ``datasets`` hashes the pickle as the cache's key.

    Pickled functions would not change when a module is edited, and some in notebooks cannot be pickled.
    """

    def __init__(
        self, rows: Callable[..., Iterator[Row]], arguments: dict[str, Any], columns: tuple[str, ...], key: str
    ) -> None:
        self.rows = rows
        self.columns = columns
        self.arguments = arguments
        self.key = key

    def __call__(self) -> Iterator[Row]:
        for row in self.rows(**self.arguments):
            yield {**dict.fromkeys(self.columns, ""), **row}

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.key,)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of ``datasets``, and restore the setting afterwards."""
    disabled = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def describe(source: object) -> str:
    """Describe a source and its arguments in one line, for model cards."""
    given = ((key.replace("_", " "), _in_words(value)) for key, value in vars(source).items() if key[0] != "_")
    return "; ".join([type(source).__name__, *(f"{key}: {words}" for key, words in given if words)])


def _in_words(value: Any) -> str:
    """Write a source's argument without Python's punctuation; empty arguments become an empty string.

    >>> _in_words({"train": "a.jsonl", "test": None}), _in_words(["x", 0.5]), _in_words({})
    ('train a.jsonl', 'x, 0.5', '')
    """
    if isinstance(value, dict):
        return ", ".join(f"{key} {words}" for key, each in value.items() if (words := _in_words(each)))
    if isinstance(value, (list, tuple, set)):
        return ", ".join(filter(None, map(_in_words, value)))
    if value is None or value == "auto":
        return ""
    if isinstance(value, (str, int, float, Path)):
        return str(value)
    return str(getattr(value, "__name__", type(value).__name__))
