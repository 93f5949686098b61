"""Starts from second moments of a layer's inputs, C = E[x xᵀ]: CorDA, LoRA-Null, EVA, Astra, SC-LoRA.

The second moments of its outputs W x, without the bias, follow as W C Wᵀ.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from milora_lightning.linalg.products import in_double
from milora_lightning.linalg.singular import SingularSlice, singular_slice
from milora_lightning.linalg.symmetric import extreme_eigenpairs
from milora_lightning.starts.algebra import significant
from milora_lightning.starts.methods import Pair
from milora_lightning.starts.statistics import Statistics, wanted
from milora_lightning.utils.errors import InvalidInputError

DAMPING = 0.01
"""CorDA's damping, relative to the mean diagonal of C: with few tokens C would be singular."""

BALANCE = 0.5
"""SC-LoRA's weight β for the data to preserve; the data to learn have weight 1 − β."""


def corda(
    weight: Tensor,
    r: int,
    statistics: Statistics | None = None,
    generator: torch.Generator | None = None,
    which: Literal["minor", "principal"] = "minor",
) -> SingularSlice:
    """Compute CorDA's start (arXiv 2406.05223): B A = U S Vᵀ C⁻¹, for r triplets of W C.

    The minor triplets preserve what the data behind C depend on (knowledge-preserved mode); the principal ones adapt to
    these data (instruction-previewed mode). C is damped by 1 % of its mean diagonal, as in the authors' code. B A does
    not depend on the scale of C, but the relative size of A and B does. Here C is scaled to a mean diagonal of 1, which
    is of the same order of magnitude as in the authors' code, where each sample is divided by its maximum and summed
    over its 2048 tokens.
    """
    C = wanted(statistics, "inputs", weight)
    if not (size := C.diagonal().mean()) > 0:
        raise InvalidInputError("the statistics 'inputs' are zero: nothing but zeros has reached the layer")
    C = C / size + DAMPING * torch.eye(len(C), dtype=C.dtype, device=C.device)
    WC = in_double(weight) @ C
    U, S, Vh = significant(WC, singular_slice(WC, r, which))
    return SingularSlice(U, S, torch.linalg.solve(C, Vh.mT.to(C)).mT)


corda_ipm = partial(corda, which="principal")


def lora_null(
    weight: Tensor, r: int, statistics: Statistics | None = None, generator: torch.Generator | None = None
) -> SingularSlice:
    """Compute LoRA-Null's start (arXiv 2503.02659): B A = W N Nᵀ, for N the r eigenvectors of C that inputs use least.

    A and B each take the square root of this product's singular values.
    """
    C = wanted(statistics, "inputs", weight)
    N = extreme_eigenpairs(C, r, "smallest")[1].to(C)  # (in, r)
    W = in_double(weight)
    U, S, Vh = torch.linalg.svd(W @ N, full_matrices=False)
    return significant(W, SingularSlice(U, S, Vh @ N.mT))


def eva(weight: Tensor, r: int, statistics: Statistics | None = None, generator: torch.Generator | None = None) -> Pair:
    """Compute EVA's start (arXiv 2410.07170): A the r principal components of the inputs, B zero.

    As in PEFT, the inputs are centred (C − E[x] E[x]ᵀ) if the statistics include their mean.
    """
    vectors = extreme_eigenpairs(covariance(statistics, weight), r, "largest")[1]
    return vectors.mT, torch.zeros(weight.shape[0], r, device=weight.device)


def covariance(statistics: Statistics | None, weight: Tensor) -> Tensor:
    """Compute the covariance of a layer's inputs (in, in), in float64; if the mean is unknown, their second moments.

    Args:
        statistics: The layer's statistics.
        weight: Its weight (out, in), which determines the device.
    """
    C = wanted(statistics, "inputs", weight)
    if statistics is None or statistics.mean is None:
        return C
    mean = statistics.mean.to(C)
    return C - torch.outer(mean, mean)


def astra(
    weight: Tensor,
    r: int,
    statistics: Statistics | None = None,
    generator: torch.Generator | None = None,
    end: Literal["largest", "smallest"] = "smallest",
) -> Pair:
    """Compute Astra's start (arXiv 2602.19111): B = Q, A = Qᵀ W, for the r tail eigenvectors Q of the outputs' W C Wᵀ.

    The paper describes the tail as directions that are hardly used. By default, the authors' code takes the last r
    eigenvectors that ``torch.linalg.eigh`` returns, which belong to the *largest* eigenvalues; that is ``astra_ipm``
    here.
    """
    return _projection(weight, wanted(statistics, "inputs", weight), r, end)


astra_ipm = partial(astra, end="largest")


def sc_lora(
    weight: Tensor,
    r: int,
    statistics: Statistics | None = None,
    generator: torch.Generator | None = None,
    balance: float = BALANCE,
) -> Pair:
    """Compute SC-LoRA's start (arXiv 2505.23724): B = Q, A = Qᵀ W, for the first r eigenvectors Q of W Δ Wᵀ.

    Δ = (1 − β) C₊ − β C₋ weighs the data to learn against those to preserve.
    """
    learned, preserved = wanted(statistics, "inputs", weight), wanted(statistics, "preserved", weight)
    return _projection(weight, (1 - balance) * learned - balance * preserved, r, "largest")


def _projection(weight: Tensor, moments: Tensor, r: int, end: Literal["largest", "smallest"]) -> Pair:
    """Return A = Qᵀ W and B = Q for the eigenvectors Q of the outputs' moments, W M Wᵀ, at one end."""
    W = in_double(weight)
    Q = extreme_eigenpairs(W @ moments @ W.mT, r, end)[1].to(W)
    return Q.mT @ W, Q
