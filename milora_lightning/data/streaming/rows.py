"""Streams of rows, for data larger than memory or disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from milora_lightning.data.reading.rows import Row
from milora_lightning.data.sources import Source, Split
from milora_lightning.utils.errors import InvalidInputError


@runtime_checkable
class Stream(Protocol):
    """Rows that are read when requested, from the first one in each iteration, like an ``IterableDataset``."""

    def __iter__(self) -> Iterator[Any]:
        """Read the rows, dicts with the columns of :meth:`milora_lightning.data.Source.load`."""
        ...

    def skip(self, n: int) -> Any:
        """Return the stream without its first rows."""
        ...


class RowStream:
    """The rows of parts, such as files, one part after the other.

    Args:
        parts: For each part, a function that opens it. It is given a number of rows to skip, and may yield None for
            each of these instead of making it.
        skipped: Number of first rows to skip.
        end: Number of rows, including skipped ones, after which the stream ends; None for all rows.
    """

    def __init__(
        self, parts: Sequence[Callable[[int], Iterator[Row | None]]], skipped: int = 0, end: int | None = None
    ) -> None:
        self.parts = parts
        self.skipped = skipped
        self.end = end

    def __iter__(self) -> Iterator[Row]:
        """Read the rows."""
        return (row for row in itertools.islice(self._rows(), self.end) if row is not None)

    def skip(self, n: int) -> RowStream:
        """Return the stream without its first rows."""
        return RowStream(self.parts, self.skipped + n, self.end)

    def take(self, n: int) -> RowStream:
        """Return the stream of only the first rows."""
        return RowStream(self.parts, self.skipped, self.skipped + n)

    def _rows(self) -> Iterator[Row | None]:
        left = self.skipped
        for part in self.parts:
            for row in part(left):
                left -= row is None
                yield row


class MixedStream:
    """Rows of several streams in turn.

    Args:
        streams: The streams.
        weights: Relative frequency of each stream, exact to one row at any time; a stream that ends starts again, and
            the mixture never ends. None for equal turns until each stream has ended once.
        skipped: Number of first rows to skip.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float] | None = None, skipped: int = 0) -> None:
        self.streams = streams
        self.weights = weights
        self.skipped = skipped

    def __iter__(self) -> Iterator[Any]:
        """Read the rows."""
        if self.weights is None:
            return itertools.islice(_in_turns(self.streams), self.skipped, None)
        turns = weighted_turns(self.weights)
        passed = [0] * len(self.streams)
        for turn in itertools.islice(turns, self.skipped):
            passed[turn] += 1
        rows = [_endless(stream, n) for stream, n in zip(self.streams, passed, strict=True)]
        return (next(rows[turn]) for turn in turns)

    def skip(self, n: int) -> MixedStream:
        """Return the stream without its first rows."""
        return MixedStream(self.streams, self.weights, self.skipped + n)


def weighted_turns(weights: Sequence[float]) -> Iterator[int]:
    """Yield the index of the next stream to read by weights: always the one furthest behind its share.

    >>> list(itertools.islice(weighted_turns([3, 1]), 8))
    [0, 0, 1, 0, 0, 0, 1, 0]
    """
    lacking, total = [0.0] * len(weights), sum(weights)
    while True:
        lacking = [lack + weight for lack, weight in zip(lacking, weights, strict=True)]
        turn = max(range(len(weights)), key=lacking.__getitem__)
        lacking[turn] -= total
        yield turn


def _in_turns(streams: Sequence[Stream]) -> Iterator[Any]:
    going = [iter(stream) for stream in streams]
    while going:
        for rows in list(going):
            try:
                yield next(rows)
            except StopIteration:
                going.remove(rows)


def _endless(stream: Stream, passed: int) -> Iterator[Any]:
    """Read a stream again and again, skipping a number of rows that may exceed its length."""
    rows = iter(stream.skip(passed))
    first = next(rows, None)
    if first is None:  # the stream is shorter than that
        size = sum(1 for _ in stream)
        if not size:
            raise InvalidInputError("A stream of the mixture has no rows. Point its source to data that is not empty.")
        rows = iter(stream.skip(passed % size))
        first = next(rows)
    while True:
        yield first
        yield from rows
        rows = iter(stream)
        first = next(rows)


def stream_of(source: Source, split: Split) -> Stream | None:
    """Return a split of a source as a stream; None if it has no such split.

    Raises:
        ValueError: If the source cannot read its data as a stream.
    """
    kind = type(source)
    maker = next((c for c in kind.__mro__ if "stream" in vars(c)), None)
    loader = next((c for c in kind.__mro__ if "load" in vars(c)), None)
    # If a subclass overrides load(), a stream() inherited from its parent would ignore that.
    if maker is not None and loader is not None and issubclass(maker, loader):
        return cast("Stream | None", source.stream(split))  # type: ignore[attr-defined]
    data = source.load(split)
    if data is None or (isinstance(data, Stream) and not hasattr(data, "__len__")):
        return data
    raise InvalidInputError(
        f"data.streaming: {kind.__name__} loads all its data at once. Leave data.streaming out, or have its load() "
        "return a datasets.IterableDataset, or give it a method stream(split) that returns rows with skip(n)."
    )
