"""Several sources as one, each with its share."""

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
    """Several sources as one.

    Without weights, an epoch has every training example of every source once. With weights, an epoch has ``size``
    examples, of which each source gives its share, exact to one example. Which ones is drawn once and is the same in
    each epoch: of a source that has more than its share a part, the rest of which is not trained on; of one that has
    fewer all of them, repeated, so that no two of its examples differ by more than one in how often they occur. A line
    says how many these are. The order of an epoch is that of any data, so runs resume as with any.

    Validation and test have every example of every source once.

    Args:
        sources: The sources, at least one.
        weights: The share of each source in the training data, above 0; they need not sum to 1. None for all
            examples as they are.
        size: Training examples in an epoch, if there are weights; None for as many as the sources have together.
        seed: Chooses the examples.

    Raises:
        ValueError: If there is no source, weights are not one positive number for each, or ``size`` is below 1 or
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
                f"weights={weights} has to be one positive number for each of the {len(sources)} sources."
            )
        if size is not None and (weights is None or size < 1):
            raise InvalidInputError(
                f"size={size} is of a mixture with weights, at least 1. Give weights, or leave size out."
            )
        self.sources = sources
        self.weights = weights
        self.size = size
        self.seed = seed

    def load(self, split: Split) -> datasets.Dataset | None:
        """Load one split of all sources that have it; None if none has."""
        loaded = [source.load(split) for source in self.sources]
        parts = [_aligned(as_dataset(part, split)) for part in loaded if part is not None]
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
        given = (
            f"{share} of {count} from {describe(source)}"
            for share, count, source in zip(shares, counts, self.sources, strict=True)
        )
        inform(f"Mixture: {sum(shares)} examples an epoch, {', '.join(given)}.")
        return mixed.select(drawn(counts, shares, self.seed))

    def stream(self, split: Split) -> MixedStream | None:
        """Return one split as a stream, for ``data.streaming``; None if no source has it.

        With weights, training rows come in these shares, exact to one row at every moment, and a source that ends
        begins anew; without, the sources take turns, and each row comes once in an epoch.

        Raises:
            ValueError: If there is a ``size``, or a source has no training data or no stream.
        """
        if self.size is not None:
            raise InvalidInputError(f"size={self.size} is of an epoch, and a stream has none. Leave size out.")
        streams = [stream_of(source, split) for source in self.sources]
        found = [stream for stream in streams if stream is not None]
        if split != "train":
            return MixedStream(found) if found else None
        if len(found) < len(streams):
            missing = self.sources[streams.index(None)]
            raise InvalidInputError(f"A source of the mixture has no train data: {describe(missing)}. Give it some.")
        return MixedStream(found, self.weights)

    def metric(self) -> Metric | None:
        """Make the metric of generated answers; None unless all sources score them in the same, plain way."""
        metrics = [source.metric() if isinstance(source, Task) else AnswerAccuracy() for source in self.sources]
        return AnswerAccuracy() if all(type(metric) is AnswerAccuracy for metric in metrics) else None


def _aligned(dataset: datasets.Dataset) -> datasets.Dataset:
    """Bring the columns into one type, as parts that are joined have to have."""
    features = datasets.Features({name: datasets.Value("large_string") for name in dataset.column_names})
    return dataset if dataset.features == features else dataset.cast(features)


def exact_shares(weights: Sequence[float], size: int) -> list[int]:
    """Share a number out by weights, each share exact to one.

    >>> exact_shares([2, 1, 1], 10)
    [5, 3, 2]
    """
    exact = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * size
    shares = np.floor(exact).astype(int)
    largest = np.argsort(-(exact - shares), kind="stable")
    shares[largest[: size - int(shares.sum())]] += 1
    return [int(share) for share in shares]


def drawn(counts: Sequence[int], shares: Sequence[int], seed: int) -> list[int]:
    """Draw indices into parts that stand one behind the other.

    Args:
        counts: How many there are in each part.
        shares: How many to draw from each.
        seed: Of the draw.

    Returns:
        The indices; those of a part occur equally often, up to one.

    >>> drawn([2, 4], [4, 4], seed=0)
    [0, 0, 1, 1, 2, 3, 4, 5]
    """
    indices: list[int] = []
    start = 0
    for part, (count, share) in enumerate(zip(counts, shares, strict=True)):
        order = np.random.default_rng((seed, part)).permutation(count)
        indices += sorted((start + np.resize(order, share)).tolist())
        start += count
    return indices
