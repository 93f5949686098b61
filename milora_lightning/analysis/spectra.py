"""Comparison of a trained model's updates with the singular spectra of the weights they update."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from milora_lightning.adapters.base_weight import dense_weight
from milora_lightning.adapters.factors import stack_factors
from milora_lightning.adapters.fused import by_part
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import groups_of, matrices_in
from milora_lightning.analysis.intruders import Intruders, find_intruders
from milora_lightning.analysis.subspace import Update, reference_subspaces
from milora_lightning.linalg.products import in_double
from milora_lightning.linalg.singular import SingularSlice, singular_slice
from milora_lightning.utils.errors import InvalidInputError

BINS = 24
"""Number of bins for an update's energy along a spectrum."""

PRINCIPAL = 128
"""Default number k of singular directions for ρ_k, the same as PrincipalProjection's default."""


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
        k: Number of principal directions for ``interference``.
        interference: ρ_k, the share of ‖ΔW‖² between the first k left and right singular vectors of W.
        intruders: Number of intruder dimensions; see :func:`milora_lightning.analysis.intruders.find_intruders`.
        effect: ‖ΔW x‖ / ‖W x‖ on data, or None if it has not been measured.
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
    k: int
    interference: float
    intruders: int
    effect: float | None = None

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
    if groups_of(layer.base_layer) > 1:  # the groups' updates are stacked along the rows, like their weights
        delta = layer.delta_weight()
        return Update.of(delta, torch.eye(delta.shape[1]).to(delta))
    A, B = stack_factors(*layer.factors)
    return Update.of(layer.scaling * B, A)


def weights_of(name: str, layer: LoRALinear) -> Iterator[tuple[str, Tensor]]:
    """Yield each matrix (out, in) that an adapter changes, with its name.

    The matrices of experts are called ``name[number]``, those of the parts of a fused projection ``name:number``.

    Args:
        name: The adapter's name.
        layer: The adapter.
    """
    weight = dense_weight(layer)
    if layer.parts:
        parts = weight.split_with_sizes(list(layer.parts))
        yield from ((f"{name}:{number}", part) for number, part in enumerate(parts))
    elif matrices_in(layer) is None:
        yield name, weight
    else:
        yield from ((f"{name}[{number}]", matrix) for number, matrix in enumerate(weight))


@torch.no_grad()
def updates_of(layer: LoRALinear) -> Iterator[Update]:
    """Decompose the updates of the matrices that :func:`weights_of` yields."""
    if layer.parts:
        held = stack_factors(*layer.held_factors, layer.scaling)
        yield from (Update.of(B, A) for A, B in by_part(*held, layer.parts, layer.r))
    elif matrices_in(layer) is None:
        yield update_of(layer)
    else:
        stacked_A, stacked_B = stack_factors(*layer.factors)
        yield from (Update.of(layer.scaling * B, A) for A, B in zip(stacked_A, stacked_B, strict=True))


def subspace_generator(name: str) -> torch.Generator:
    """Return the generator of a layer's random subspace, seeded with the layer's name only."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


class Reference(NamedTuple):
    """Singular vectors of a weight (out, in) to compare its update with.

    Attributes:
        subspaces: Left singular vectors, each (out, r), chosen by :func:`reference_subspaces`.
        left: The first k left singular vectors, (out, k).
        right: The first k right singular vectors, (in, k).
    """

    subspaces: dict[str, Tensor]
    left: Tensor
    right: Tensor

    def to(self, device: torch.device) -> Reference:
        """Move them to a device, in float32."""
        moved = {name: vectors.to(device, torch.float32) for name, vectors in self.subspaces.items()}
        return Reference(moved, self.left.to(device, torch.float32), self.right.to(device, torch.float32))


def reference_vectors(name: str, weight: Tensor, r: int, k: int) -> Reference:
    """Return the singular vectors to compare a rank-r update of a layer's weight with.

    Args:
        name: The layer's name, the seed of random subspaces.
        weight: Its weight (out, in).
        r: Rank of the update.
        k: Number of principal directions, as for :func:`analyze_matrix`.
    """
    triplets = _triplets(weight)
    k = _principal(k, weight, r)
    subspaces = reference_subspaces(triplets.U, r, subspace_generator(name))
    return Reference(subspaces, triplets.U[:, :k].clone(), triplets.Vh[:k].mT.contiguous())


def _principal(k: int, weight: Tensor, r: int) -> int:
    return max(1, min(k, min(weight.shape) - r))


def _triplets(weight: Tensor) -> SingularSlice:
    return singular_slice(weight, min(weight.shape), "principal")


def number_of_intruders(weight: Tensor, update: Update, left: Tensor, rule: Intruders) -> int:
    """Count the intruder dimensions of W + ΔW, given all left singular vectors (out, k) of W.

    Args:
        weight: The frozen weight W (out, in).
        update: The update ΔW.
        left: All left singular vectors of W (out, k).
        rule: What counts as an intruder.
    """
    tuned = in_double(weight) + in_double(update.U) * update.S @ update.Vh
    return len(find_intruders(weight, tuned, left, rule).S)


@torch.no_grad()
def analyze_matrix(
    name: str,
    weight: Tensor,
    update: Update,
    r: int,
    bins: int = BINS,
    k: int = PRINCIPAL,
    rule: Intruders = Intruders(),  # noqa: B008 (frozen)
) -> MatrixAnalysis | None:
    """Compare an update with the spectrum of its weight (MiLoRA, arXiv 2406.09044, sections 5.3, A.1).

    Args:
        name: Name of the layer.
        weight: The frozen weight, shape (out, in).
        update: The update of the weight.
        r: Number of singular vectors to compare.
        bins: Number of bins along the spectrum.
        k: Number of principal directions for ρ_k; at most all but r.
        rule: What counts as an intruder dimension.

    Returns:
        The analysis, or None if the update is zero.
    """
    r = min(r, len(update.S))
    if r == 0:
        return None
    triplets = _triplets(weight)
    similarity = update.similarities(reference_subspaces(triplets.U, r, subspace_generator(name)), r)
    left, right = update.energy(triplets, min(bins, len(triplets.S)))
    k = _principal(k, weight, r)
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
        k,
        update.interference(triplets.U[:, :k], triplets.Vh[:k].mT),
        number_of_intruders(weight, update, triplets.U, rule),
    )


def analyze_model(
    module: nn.Module,
    description: str = "Analyzing",
    k: int = PRINCIPAL,
    rule: Intruders = Intruders(),  # noqa: B008 (frozen)
    effects: Mapping[str, float] | None = None,
) -> list[MatrixAnalysis]:
    """Analyze every adapter of a model whose update is not zero, with a progress bar.

    Args:
        module: Any module with adapters.
        description: Label of the progress bar.
        k: Number of principal directions for ρ_k.
        rule: What counts as an intruder dimension.
        effects: ‖ΔW x‖ / ‖W x‖ by layer name, if measured.

    Returns:
        One analysis for each adapter whose update is not zero.

    Raises:
        ValueError: If there is no such adapter.
    """
    layers = lora_layers(module).items()
    analyses = [
        analyze_matrix(matrix, weight, update, layer.r, k=k, rule=rule)
        for name, layer in track(layers, description, transient=True)
        for (matrix, weight), update in zip(weights_of(name, layer), updates_of(layer), strict=True)
    ]
    updated = [matrix for matrix in analyses if matrix is not None]
    if not updated:
        raise InvalidInputError(
            "There is no update to analyze: the module has no adapters, or they have not been trained."
        )
    found = effects or {}
    return [replace(matrix, effect=found.get(matrix.layer)) for matrix in updated]
