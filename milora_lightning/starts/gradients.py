"""Starts from the gradient of the loss with respect to the frozen weight, on a few batches: LoRA-GA and LoRA-One."""

from __future__ import annotations

import torch
from torch import Tensor

from milora_lightning.linalg.singular import SingularSlice, singular_slice
from milora_lightning.starts.methods import Pair
from milora_lightning.starts.statistics import Statistics, wanted
from milora_lightning.utils.errors import InvalidInputError

STABLE_GAMMA = 16
"""LoRA-GA's γ, as in its paper and in PEFT."""

ONE_GAMMA = 128
"""LoRA-One's γ, as in its authors' experiments on language models."""


def lora_ga(
    weight: Tensor, r: int, statistics: Statistics | None = None, generator: torch.Generator | None = None
) -> Pair:
    """Compute LoRA-GA's start (arXiv 2407.05000), whose first step is as close as possible to full fine-tuning's.

    A holds the first r right singular vectors of the gradient, B the next r left ones; both are scaled by out^(1/4) /
    √γ, with γ = 16. (PEFT also multiplies B by the gradient's singular values, and scales B only.)
    """
    if 2 * r > min(weight.shape):
        raise InvalidInputError(
            f"lora_ga takes 2r = {2 * r} singular vectors, and a weight of shape {tuple(weight.shape)} has "
            f"{min(weight.shape)}: set r to {min(weight.shape) // 2} at most, for this layer by rank_pattern"
        )
    U, _, Vh = _triplets(weight, 2 * r, statistics)
    scale = weight.shape[0] ** 0.25 / STABLE_GAMMA**0.5
    return scale * Vh[:r], scale * U[:, r:]


def lora_one(
    weight: Tensor, r: int, statistics: Statistics | None = None, generator: torch.Generator | None = None
) -> Pair:
    """Compute LoRA-One's start (arXiv 2502.01235): B A is the first r triplets of −G / (σ₁ γ), γ = 128.

    In the paper, the model starts one step away from the pretrained one. Here, as with all starts, B₀A₀ is subtracted,
    so that it starts at the pretrained model.
    """
    U, S, Vh = _triplets(weight, r, statistics)
    root = (S / S[0] / ONE_GAMMA).sqrt()
    return root[:, None] * Vh, -U * root


def _triplets(weight: Tensor, r: int, statistics: Statistics | None) -> SingularSlice:
    gradient = wanted(statistics, "gradient", weight)
    if not gradient.any():
        raise InvalidInputError(
            "the gradient of its weight is zero: no loss depends on it in these batches. Leave it out by "
            "exclude_modules, or give more batches"
        )
    return singular_slice(gradient, r, "principal")
