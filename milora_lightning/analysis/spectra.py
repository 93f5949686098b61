"""Comparison of a trained model's updates with the singular spectra of the weights they update."""

from __future__ import annotations

import csv
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.box import SIMPLE
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from milora_lightning.adapters.base_weight import dense_weight
from milora_lightning.adapters.factors import stack_factors
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import groups_of, matrices_in
from milora_lightning.analysis.subspace import Update, reference_subspaces
from milora_lightning.linalg.singular import SingularSlice, singular_slice
from milora_lightning.utils.errors import InvalidInputError

BINS = 24
"""Number of bins for an update's energy along a spectrum."""


@dataclass(frozen=True)
class MatrixAnalysis:
    """Analysis of the update of one adapted matrix W of shape (out, in), with k = min(out, in).

    Attributes:
        layer: Name of the layer.
        r: Number of singular vectors of ΔW compared: the adapter's rank, or that of ΔW if it is lower.
        singular_values: Singular values of W, shape (k,).
        delta_singular_values: Nonzero singular values of ΔW.
        similarity: φ of ΔW's top r left singular vectors with W's ``top``, ``bottom`` and ``random`` r, and the
            expected value for random subspaces, ``expected`` = r / out.
        amplification: ‖UᵀΔWV‖_F / ‖UᵀWV‖_F.
        relative_norm: ‖ΔW‖_F / ‖W‖_F.
        left_energy: Share of ‖ΔW‖² along bins of W's left singular vectors, starting with the largest singular value.
        right_energy: The same for the right singular vectors.
    """

    layer: str
    r: int
    singular_values: Tensor
    delta_singular_values: Tensor
    similarity: dict[str, float]
    amplification: float
    relative_norm: float
    left_energy: Tensor
    right_energy: Tensor

    @property
    def module_type(self) -> str:
        """The last part of the layer's name, without the number of an expert."""
        return module_type(self.layer)

    @property
    def depth(self) -> int:
        """The number of the block the layer is in."""
        return block_number(self.layer)


def module_type(layer: str) -> str:
    """Return the last part of a layer's name, without the number of an expert.

    >>> module_type("layers.0.mlp.experts.down_proj[3]")
    'down_proj'
    """
    return layer.rsplit(".", 1)[-1].partition("[")[0]


def block_number(layer: str) -> int:
    """Return the first number in a layer's name, 0 if there is none.

    >>> block_number("model.layers.12.self_attn.q_proj")
    12
    """
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)
    return int(number[1]) if number else 0


@torch.no_grad()
def update_of(layer: LoRALinear) -> Update:
    """Decompose the update of an adapter, ΔW = s (B A − B₀A₀)."""
    if groups_of(layer.base_layer) > 1:  # the groups' updates below one another, as their weights are
        delta = layer.delta_weight()
        return Update.of(delta, torch.eye(delta.shape[1]).to(delta))
    A, B = stack_factors(*layer.factors)
    return Update.of(layer.scaling * B, A)


def weights_of(name: str, layer: LoRALinear) -> Iterator[tuple[str, Tensor]]:
    """Yield each matrix (out, in) that an adapter changes, with its name: of experts, ``name[number]``."""
    weight = dense_weight(layer)
    if matrices_in(layer) is None:
        yield name, weight
    else:
        yield from ((f"{name}[{number}]", matrix) for number, matrix in enumerate(weight))


@torch.no_grad()
def updates_of(layer: LoRALinear) -> Iterator[Update]:
    """Decompose the updates of the matrices that :func:`weights_of` yields."""
    if matrices_in(layer) is None:
        yield update_of(layer)
    else:
        stacked_A, stacked_B = stack_factors(*layer.factors)
        yield from (Update.of(layer.scaling * B, A) for A, B in zip(stacked_A, stacked_B, strict=True))


def subspace_generator(name: str) -> torch.Generator:
    """Return the generator of a layer's random subspace, seeded by the layer's name alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def reference_vectors(name: str, weight: Tensor, r: int) -> dict[str, Tensor]:
    """Return the left singular vectors (out, r) of a layer's weight that its update is compared with."""
    return reference_subspaces(_triplets(weight).U, r, subspace_generator(name))


def _triplets(weight: Tensor) -> SingularSlice:
    return singular_slice(weight, min(weight.shape), "principal")


@torch.no_grad()
def analyze_matrix(name: str, weight: Tensor, update: Update, r: int, bins: int = BINS) -> MatrixAnalysis | None:
    """Compare an update with the spectrum of its weight (MiLoRA, arXiv 2406.09044, sections 5.3, A.1).

    Args:
        name: Name of the layer.
        weight: The frozen weight, shape (out, in).
        update: The update of the weight.
        r: Number of singular vectors to compare.
        bins: Number of bins along the spectrum.

    Returns:
        The analysis, or None if the update is zero.
    """
    r = min(r, len(update.S))
    if r == 0:
        return None
    triplets = _triplets(weight)
    similarity = update.similarities(reference_subspaces(triplets.U, r, subspace_generator(name)), r)
    left, right = update.energy(triplets, min(bins, len(triplets.S)))
    return MatrixAnalysis(
        name,
        r,
        triplets.S,
        update.S,
        {**similarity, "expected": r / weight.shape[0]},
        update.amplification(weight, r),
        float(torch.linalg.vector_norm(update.S) / torch.linalg.vector_norm(triplets.S)),
        left,
        right,
    )


def analyze_model(module: nn.Module, description: str = "Analyzing") -> list[MatrixAnalysis]:
    """Analyze every adapter of a model whose update is not zero, with a progress bar.

    Args:
        module: Any module with adapters.
        description: Label of the progress bar.

    Returns:
        One analysis for each adapter whose update is not zero.

    Raises:
        ValueError: If there is none.
    """
    layers = lora_layers(module).items()
    analyses = [
        analyze_matrix(matrix, weight, update, layer.r)
        for name, layer in track(layers, description, transient=True)
        for (matrix, weight), update in zip(weights_of(name, layer), updates_of(layer), strict=True)
    ]
    updated = [matrix for matrix in analyses if matrix is not None]
    if not updated:
        raise InvalidInputError(
            "There is no update to analyze: the module has no adapters, or they have not been trained."
        )
    return updated


def by_type(matrices: Iterable[MatrixAnalysis]) -> dict[str, list[MatrixAnalysis]]:
    """Group matrices by module type; each group is in the order of its layers."""
    groups = defaultdict(list)
    for matrix in matrices:
        groups[matrix.module_type].append(matrix)
    return {name: sorted(group, key=lambda matrix: matrix.depth) for name, group in groups.items()}


def averages(matrices: Sequence[MatrixAnalysis]) -> dict[str, float]:
    """Average similarities, amplification and relative norm over matrices."""
    return {
        **{key: mean(m.similarity[key] for m in matrices) for key in matrices[0].similarity},
        "amplification": mean(m.amplification for m in matrices),
        "relative_norm": mean(m.relative_norm for m in matrices),
    }


def summary(matrices: Sequence[MatrixAnalysis]) -> Table:
    """Return a table of averages over layers, with one row for each module type."""
    columns = "layers", "φ top", "bottom", "random", "r/out", "amplification", "‖ΔW‖/‖W‖"
    title = "Similarity φ of ΔW with parts of W's spectrum, means over layers"
    table = Table("module", *columns, title=title, title_justify="left", box=SIMPLE, collapse_padding=True)
    for name, group in by_type(matrices).items():
        table.add_row(name, str(len(group)), *(f"{value:.3g}" for value in averages(group).values()))
    return table


def write_tables(folder: Path, matrices: Sequence[MatrixAnalysis]) -> None:
    """Write analyses to similarity.csv, spectra.csv and energy.csv in a folder."""
    names = list(matrices[0].similarity)
    _write_csv(
        folder / "similarity.csv",
        ("layer", "module", "block", "r", *names, "amplification", "relative_norm"),
        (
            (m.layer, m.module_type, m.depth, m.r, *m.similarity.values(), m.amplification, m.relative_norm)
            for m in matrices
        ),
    )
    _write_csv(
        folder / "spectra.csv",
        ("layer", "module", "block", "matrix", "index", "singular_value"),
        (
            (m.layer, m.module_type, m.depth, matrix, index, value)
            for m in matrices
            for matrix, values in (("W", m.singular_values), ("delta", m.delta_singular_values))
            for index, value in enumerate(values.tolist())
        ),
    )
    _write_csv(
        folder / "energy.csv",
        ("layer", "module", "block", "from", "to", "left", "right"),
        (
            (m.layer, m.module_type, m.depth, i / len(m.left_energy), (i + 1) / len(m.left_energy), left, right)
            for m in matrices
            for i, (left, right) in enumerate(zip(m.left_energy.tolist(), m.right_energy.tolist(), strict=True))
        ),
    )


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)
