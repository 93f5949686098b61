"""A source that mixes several sources, optionally with weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import numpy as np
from torchmetrics import Metric

from milora_lightning.data.columns import as_dataset
from milora_lightning.data.sources import Source, Split, Task, describe
from milora_lightning.data.streaming.rows import MixedStream, stream_of
from milora_lightning.metrics import AnswerAccuracy
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import inform


class Mixture(Source):
    """Several sources combined into one.

    Without weights, an epoch has every training example of every source once. With weights, an epoch has ``size``
    examples, shared among the sources in proportion to their weights, exact to one example. The examples are drawn
    once and are the same in each epoch. A source with more examples than its share is subsampled, and the rest is not
    trained on. A source with fewer is repeated, and its examples occur equally often, up to one. A logged line gives
    the numbers. The examples are shuffled like those of any source, and runs resume as usual.

    Validation and test have every example of every source once.

    Args:
        sources: The sources, at least one.
        weights: The weight of each source in the training data, above 0; they need not sum to 1. None for every
            example once.
        size: Training examples in an epoch if there are weights; None for as many as all sources have together.
        seed: Seed for drawing the examples.

    Raises:
        ValueError: If there is no source, weights are not one positive number per source, or ``size`` is below 1 or
            given without weights; when loading, if a source has no training data.
    """

    def __init__(
        self, sources: list[Source], weights: list[float] | None = None, size: int | None = None, seed: int = 0
    ) -> None:
        if not sources:
            raise InvalidInputError("Mixture has no sources. Give it at least one.")
        if weights is not None and (
            len(weights) != len(sources) or not all(weight > 0 and math.isfinite(weight) for weight in weights)
        ):
            raise InvalidInputError(
                f"weights={weights} must be one positive number for each of the {len(sources)} sources."
            )
        if size is not None and (weights is None or size < 1):
            raise InvalidInputError(f"size={size} must be at least 1 and needs weights. Give both, or leave size out.")
        self.sources = sources
        self.weights = weights
        self.size = size
        self.seed = seed

    def load(self, split: Split) -> datasets.Dataset | None:
        """Load one split of all sources that have it; None if no source has it."""
        loaded = [source.load(split) for source in self.sources]
        parts = [_with_text_columns(as_dataset(part, split)) for part in loaded if part is not None]
        if not parts:
            return None
        if split == "train" and len(parts) < len(self.sources):
            missing = self.sources[next(i for i, part in enumerate(loaded) if part is None)]
            raise InvalidInputError(f"A source of the mixture has no train data: {describe(missing)}. Give it some.")
        mixed = datasets.concatenate_datasets(parts)
        if split != "train" or self.weights is None:
            return mixed
        counts = [len(part) for part in parts]
        shares = exact_shares(self.weights, self.size or sum(counts))
        numbers = (
            f"{share} of {count} from {describe(source)}"
            for share, count, source in zip(shares, counts, self.sources, strict=True)
        )
        inform(f"Mixture: {sum(shares)} examples an epoch, {', '.join(numbers)}.")
        return mixed.select(draw_indices(counts, shares, self.seed))

    def stream(self, split: Split) -> MixedStream | None:
        """Return one split as a stream, for ``data.streaming``; None if no source has it.

        With weights, training rows come in these proportions, exact to one row at any time, and a source that ends
        starts again. Without weights, the sources take turns, and each row comes once per epoch.

        Raises:
            ValueError: If there is a ``size``, or a source has no training data or no stream.
        """
        if self.size is not None:
            raise InvalidInputError(f"size={self.size} is for epochs, which a stream does not have. Leave size out.")
        streams = [stream_of(source, split) for source in self.sources]
        found = [stream for stream in streams if stream is not None]
        if split != "train":
            return MixedStream(found) if found else None
        if len(found) < len(streams):
            missing = self.sources[streams.index(None)]
            raise InvalidInputError(f"A source of the mixture has no train data: {describe(missing)}. Give it some.")
        return MixedStream(found, self.weights)

    def metric(self) -> Metric | None:
        """Return the metric of generated answers; None unless all sources use :class:`AnswerAccuracy`."""
        metrics = [source.metric() if isinstance(source, Task) else AnswerAccuracy() for source in self.sources]
        return AnswerAccuracy() if all(type(metric) is AnswerAccuracy for metric in metrics) else None


def _with_text_columns(dataset: datasets.Dataset) -> datasets.Dataset:
    """Cast all columns to the same text type, as concatenation needs."""
    features = datasets.Features({name: datasets.Value("large_string") for name in dataset.column_names})
    return dataset if dataset.features == features else dataset.cast(features)


def exact_shares(weights: Sequence[float], size: int) -> list[int]:
    """Divide a number in proportion to weights; each share is exact to one, and the shares sum to the number.

    >>> exact_shares([2, 1, 1], 10)
    [5, 3, 2]
    """
    exact = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * size
    shares = np.floor(exact).astype(int)
    largest = np.argsort(-(exact - shares), kind="stable")
    shares[largest[: size - int(shares.sum())]] += 1
    return [int(share) for share in shares]


def draw_indices(counts: Sequence[int], shares: Sequence[int], seed: int) -> list[int]:
    """Draw indices from concatenated parts.

    Args:
        counts: Number of examples in each part.
        shares: Number of indices to draw from each part.
        seed: Seed of the draw.

    Returns:
        The indices; those of a part occur equally often, up to one.

    >>> draw_indices([2, 4], [4, 4], seed=0)
    [0, 0, 1, 1, 2, 3, 4, 5]
    """
    indices: list[int] = []
    start = 0
    for part, (count, share) in enumerate(zip(counts, shares, strict=True)):
        order = np.random.default_rng((seed, part)).permutation(count)
        indices += sorted((start + np.resize(order, share)).tolist())
        start += count
    return indices
