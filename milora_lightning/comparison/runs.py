"""The runs of a comparison, and their results as files."""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from milora_lightning.comparison.statistics import DRAWS, Array, draw_counts, weighted_means
from milora_lightning.utils.errors import InvalidInputError

Row = dict[str, float]

TRAJECTORY, EXAMPLES = "trajectory.csv", "examples.npz"
"""Files in a run's folder: the results of every validation, and their values for each example."""

PARTS = ("values", "weights", "steps", "index")


@dataclass(frozen=True)
class Examples:
    """The values on single examples that a result averages over.

    Attributes:
        values: Value of each example at each validation, shape (validations, examples).
        weights: Weight of each example, such as its number of tokens, shape (examples,).
        steps: Optimizer steps of the validations, shape (validations,).
        index: Indices of the examples in their data set, ascending, shape (examples,).
    """

    values: Array
    weights: Array
    steps: Array
    index: npt.NDArray[np.int64]

    def means(self, counts: Array | None = None) -> Array:
        """Average over examples, or over draws of them: see :func:`weighted_means`."""
        return weighted_means(self.values, self.weights, counts)

    def only(self, members: npt.NDArray[np.int64]) -> Examples:
        """Return only the examples with these indices."""
        chosen = np.isin(self.index, members)
        return Examples(self.values[:, chosen], self.weights[chosen], self.steps, self.index[chosen])


@dataclass
class Run:
    """One run of a comparison.

    Attributes:
        method: Name of the method.
        learning_rate: The peak learning rate.
        seed: Seed of random factors, dropout and the order of the data.
        rows: The results of every validation; empty before the run.
        examples: By name of a result, its values on single examples, if they are stored.
    """

    method: str
    learning_rate: float
    seed: int
    rows: list[Row] = field(default_factory=list)
    examples: dict[str, Examples] = field(default_factory=dict)
    _draws: dict[str, Array] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """Name of the run and its folder."""
        return f"{self.method.replace(' ', '_')}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def last(self) -> Row:
        """The results at the end of training."""
        return self.rows[-1]

    def course(self, name: str) -> Array:
        """Return a result at every validation, shape (validations,); NaN where it was not measured."""
        return np.array([row.get(name, np.nan) for row in self.rows])

    def draws(self, name: str) -> Array:
        """Return a result at every validation on draws of its examples, shape (draws, validations).

        The draws are the same for all runs. For results whose examples are not stored, the shape is (1, validations).
        """
        if name not in self.examples:
            return self.course(name)[None]
        if name not in self._draws:
            examples = self.examples[name]
            counts = draw_counts(len(examples.index), DRAWS, zlib.crc32(name.encode()))
            self._draws[name] = examples.means(counts)
        return self._draws[name]

    def has(self, name: str) -> bool:
        """Return whether a result was measured at the end."""
        return name in self.last

    def read(self, folder: Path) -> None:
        """Read the results of a finished run from its folder.

        Raises:
            ValueError: If it is from a version that stored too little.
        """
        if not (folder / EXAMPLES).is_file():
            raise InvalidInputError(
                f"{folder} holds a run of an earlier version, which did not keep the losses of single examples. Choose "
                "another output, or remove the folder to run it again."
            )
        self.rows = read_rows(folder / TRAJECTORY)
        self.examples = read_examples(folder / EXAMPLES)

    def write(self, folder: Path) -> None:
        """Write the results to the folder of the run."""
        write_rows(folder / TRAJECTORY, self.rows)
        write_examples(folder / EXAMPLES, self.examples)


def check_same_examples(runs: Sequence[Run]) -> None:
    """Refuse runs of a method that were measured on other examples, as if the data had changed between them.

    Raises:
        ValueError: If there are such runs.
    """
    for own in by_method(runs).values():
        first: dict[str, Run] = {}
        for run in own:
            for name, each in run.examples.items():
                other = first.setdefault(name, run).examples[name]
                if not (np.array_equal(each.index, other.index) and np.array_equal(each.weights, other.weights)):
                    raise InvalidInputError(
                        f"{first[name].name} and {run.name} were measured on other examples ({name}): their data have "
                        "changed in between. Choose another output, or remove the folders of the earlier runs."
                    )


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by method, in the order of their first run."""
    return {name: [run for run in runs if run.method == name] for name in dict.fromkeys(r.method for r in runs)}


def read_rows(path: Path) -> list[Row]:
    """Read rows of numbers written by :func:`write_rows`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV; missing entries stay empty.

    Args:
        path: The file to write.
        rows: The rows, by column.
    """
    columns = dict.fromkeys(key for row in rows for key in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_examples(path: Path, examples: Mapping[str, Examples]) -> None:
    """Write the values of results on single examples, in float32."""
    arrays = {f"{name}:{part}": getattr(each, part) for name, each in examples.items() for part in PARTS}
    halved = {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in arrays.items()}
    np.savez_compressed(path, **halved)


def read_examples(path: Path) -> dict[str, Examples]:
    """Read what :func:`write_examples` wrote.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        with np.load(path) as arrays:
            names = dict.fromkeys(name.rpartition(":")[0] for name in arrays.files)
            return {name: _examples(*(arrays[f"{name}:{part}"] for part in PARTS)) for name in names}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InvalidInputError(f"{path} cannot be read ({error}): remove its folder to run it again.") from error


def _examples(values: Any, weights: Any, steps: Any, index: Any) -> Examples:
    return Examples(values.astype(np.float64), weights.astype(np.float64), steps.astype(np.float64), index)
