"""Named starts that are not slices of the spectrum: LoRA, MiCA, OLoRA and orthogonal factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from milora_lightning.linalg.products import in_double
from milora_lightning.linalg.singular import singular_slice
from milora_lightning.utils.errors import InvalidInputError

Pair = tuple[Tensor, Tensor]
"""``lora_A`` (r, in) and ``lora_B`` (out, r)."""


def lora(weight: Tensor, r: int, statistics: Any = None, generator: torch.Generator | None = None) -> Pair:
    """Compute LoRA's start (arXiv 2106.09685): A Kaiming-uniform, B zero."""
    bound = 1 / math.sqrt(weight.shape[1])  # the bound of kaiming_uniform_(a=√5), as in LoRA
    lora_A = torch.empty(r, weight.shape[1], device="cpu").uniform_(-bound, bound, generator=generator)
    return lora_A.to(weight.device), torch.zeros(weight.shape[0], r, device=weight.device)


def mica(weight: Tensor, r: int, statistics: Any = None, generator: torch.Generator | None = None) -> Pair:
    """Compute MiCA's start (arXiv 2604.01694): B frozen at the minor left singular vectors, A trained from zero."""
    U = singular_slice(weight, r, "minor").U
    return torch.zeros(r, weight.shape[1], device=weight.device), U


def olora(weight: Tensor, r: int, statistics: Any = None, generator: torch.Generator | None = None) -> Pair:
    """Compute OLoRA's start (arXiv 2406.01775): with W = Q R, the first r columns of Q in B and rows of R in A.

    The first r columns of Q depend only on the first r of W, and the rows of R are Qᵀ W, so the rest is not computed.
    """
    W = in_double(weight.detach())
    if not W.isfinite().all():
        raise InvalidInputError("the weight has NaN or infinite entries: check the checkpoint")
    Q, _ = torch.linalg.qr(W[:, :r])
    R = Q.mT @ W
    below = torch.ones(r, r, dtype=torch.bool, device=R.device).tril(-1)
    R[:, :r].masked_fill_(below, 0.0)  # exact zeros of the factorization, which the product has only up to rounding
    return R.float().to(weight.device), Q.float().to(weight.device)


def orthogonal(weight: Tensor, r: int, statistics: Any = None, generator: torch.Generator | None = None) -> Pair:
    """Compute PEFT's orthogonal start: random A and B from orthogonal subspaces of r/2 dimensions, so that B A = 0."""
    if r % 2:
        raise InvalidInputError(f"the orthogonal start halves the rank, and r={r} is odd: take an even r")

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    Q, _ = torch.linalg.qr(draw(r, r))
    lora_A = (draw(weight.shape[1], r // 2) @ Q[0::2]).mT / 10
    lora_B = draw(weight.shape[0], r // 2) @ Q[1::2] / 10
    return lora_A.float().contiguous().to(weight.device), lora_B.float().to(weight.device)
