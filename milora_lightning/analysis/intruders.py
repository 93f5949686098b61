"""Intruder dimensions: new directions that fine-tuning has added among a weight's largest singular vectors.

An intruder is one of the largest singular vectors of W + ΔW that is similar to none of W's (arXiv 2410.21228). Models
with more intruders forget more, and shrinking them restores some of what was forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from milora_lightning.adapters.base_weight import dense_weight
from milora_lightning.adapters.factors import stack_factors
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import groups_of
from milora_lightning.linalg.products import in_double
from milora_lightning.linalg.singular import SingularSlice, singular_slice
from milora_lightning.utils.errors import InvalidInputError

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Intruders:
    """Which dimensions count as intruders, and how they are shrunk. The defaults are PEFT's.

    Args:
        keep: The fraction of an intruder's singular value in W + ΔW that is kept when it is shrunk: the paper's λ.
        top_k: How many of the largest singular vectors of W + ΔW are examined.
        threshold: A vector is an intruder if its cosine with each of W's left singular vectors is below this.

    Raises:
        ValueError: If a value is out of its range.
    """

    keep: float = 0.75
    top_k: int = 10
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise InvalidInputError(
                f"Intruders keep from 0 (nothing) to 1 (all) of their singular values, not {self.keep}."
            )
        if self.top_k < 1:
            raise InvalidInputError(f"top_k={self.top_k} looks at no singular vector: it must be at least 1.")
        if not 0 < self.threshold <= 1:
            raise InvalidInputError(f"threshold is a cosine above 0 and up to 1, not {self.threshold}.")


def find_intruders(weight: Tensor, tuned: Tensor, left: Tensor, rule: Intruders) -> SingularSlice:
    """Find the intruders of a fine-tuned weight.

    Args:
        weight: W (out, in).
        tuned: W + ΔW (out, in).
        left: All left singular vectors of W, shape (out, k).
        rule: What counts as an intruder.

    Returns:
        Their singular triplets in W + ΔW, in descending order; r is 0 if there are none.
    """
    top = singular_slice(tuned, min(rule.top_k, *weight.shape), "principal")
    strangers = (in_double(left).mT @ in_double(top.U)).abs().amax(0) < rule.threshold
    return SingularSlice(top.U[:, strangers], top.S[strangers], top.Vh[strangers])


def shrinking(intruders: SingularSlice, keep: float) -> Pair:
    """Return factors (out, n) and (n, in) of the correction that shrinks intruders, (keep − 1) U S Vᵀ."""
    U, S, Vh = intruders
    return (keep - 1) * U * S.sqrt(), S.sqrt()[:, None] * Vh


@torch.no_grad()
def corrections(layers: Mapping[str, LoRALinear], rule: Intruders) -> dict[LoRALinear, Pair]:
    """Compute what shrinks the intruders of adapters, with a progress bar: each weight is decomposed.

    Args:
        layers: The adapters by name.
        rule: What counts as an intruder, and how much of it is kept.

    Returns:
        For each adapter with intruders, factors (out, n) and (n, in) whose product is to be added to ΔW; of experts,
        (experts, out, n) and (experts, n, in), with zeros where one has fewer than others.

    Raises:
        ValueError: If an adapter is of a convolution of several groups.
    """
    found = {}
    for name, layer in track(layers.items(), "Looking for intruders", transient=True):
        if groups_of(layer.base_layer) > 1:
            raise InvalidInputError(
                f"Intruders of {name!r}, a convolution of several groups, cannot be shrunk: export without "
                "shrink_intruders."
            )
        A, B = stack_factors(*layer.factors, layer.scaling)
        weight = dense_weight(layer)
        matrices = zip(*(x.reshape(-1, *x.shape[-2:]) for x in (weight, B, A)), strict=True)
        pairs = [shrinking(_intruders_of(each, each_B, each_A, rule), rule.keep) for each, each_B, each_A in matrices]
        most = max(len(right) for _, right in pairs)
        if most:
            left = torch.stack([torch.nn.functional.pad(each, (0, most - each.shape[1])) for each, _ in pairs])
            right = torch.stack([torch.nn.functional.pad(each, (0, 0, 0, most - len(each))) for _, each in pairs])
            found[layer] = left.view(*weight.shape[:-1], most).to(B), right.view(*A.shape[:-2], *right.shape[1:]).to(A)
    return found


def _intruders_of(weight: Tensor, B: Tensor, A: Tensor, rule: Intruders) -> SingularSlice:
    left = singular_slice(weight, min(weight.shape), "principal").U
    return find_intruders(weight, in_double(weight) + in_double(B) @ in_double(A), left, rule)
