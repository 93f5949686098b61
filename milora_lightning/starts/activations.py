"""Starts from second moments of a layer's inputs, C = E[x xᵀ]: CorDA, LoRA-Null, EVA, Astra, SC-LoRA.

Those of its outputs W x follow as W C Wᵀ; a bias is left out of them.
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
"""What CorDA adds to the diagonal of C, over its mean: C of few tokens has no inverse."""

BALANCE = 0.5
"""SC-LoRA's weight β of what is to be preserved, against 1 − β for what is to be learned."""


def corda(
    weight: Tensor,
    r: int,
    statistics: Statistics | None = None,
    generator: torch.Generator | None = None,
    which: Literal["minor", "principal"] = "minor",
) -> SingularSlice:
    """Compute CorDA's start (arXiv 2406.05223): of W C = U S Vᵀ, r triplets as B A = U S Vᵀ C⁻¹.

    The minor ones keep what the data of C need (knowledge-preserved mode), the principal ones are adapted to them
    (instruction-previewed mode). C is damped by 1 % of its mean diagonal, as in the authors' code. B A does not depend
    on the scale of C, but how it is shared out between A and B does: C is scaled to a mean diagonal of 1 here, whose
    order of magnitude is that of the authors', who divide each sample by its maximum and sum over its 2048 tokens.
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

    A and B share out the singular values of this product.
    """
    C = wanted(statistics, "inputs", weight)
    N = extreme_eigenpairs(C, r, "smallest")[1].to(C)  # (in, r)
    W = in_double(weight)
    U, S, Vh = torch.linalg.svd(W @ N, full_matrices=False)
    return significant(W, SingularSlice(U, S, Vh @ N.mT))


def eva(weight: Tensor, r: int, statistics: Statistics | None = None, generator: torch.Generator | None = None) -> Pair:
    """Compute EVA's start (arXiv 2410.07170): A the r principal components of the inputs, B zero.

    As in PEFT they are those of the centred inputs, of C − E[x] E[x]ᵀ, if the mean is among the statistics.
    """
    vectors = extreme_eigenpairs(covariance(statistics, weight), r, "largest")[1]
    return vectors.mT, torch.zeros(weight.shape[0], r, device=weight.device)


def covariance(statistics: Statistics | None, weight: Tensor) -> Tensor:
    """Compute the covariance of a layer's inputs (in, in), in float64; without a mean, their second moments."""
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
    """Compute Astra's start (arXiv 2602.19111): B = Q, A = Qᵀ W, for Q the r tail eigenvectors of outputs' W C Wᵀ.

    The paper describes the tail as directions that are hardly used. The authors' code takes, by default, the last r
    that ``torch.linalg.eigh`` returns, which belong to the *largest* eigenvalues: that is ``astra_ipm``.
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
    """Compute SC-LoRA's start (arXiv 2505.23724): B = Q, A = Qᵀ W, for the r first eigenvectors Q of W Δ Wᵀ.

    Δ = (1 − β) C₊ − β C₋ weighs the data to learn against those to preserve.
    """
    learned, preserved = wanted(statistics, "inputs", weight), wanted(statistics, "preserved", weight)
    return _projection(weight, (1 - balance) * learned - balance * preserved, r, "largest")


def _projection(weight: Tensor, moments: Tensor, r: int, end: Literal["largest", "smallest"]) -> Pair:
    """Return A = Qᵀ W and B = Q for the eigenvectors Q of the outputs' moments, W M Wᵀ, at one end."""
    W = in_double(weight)
    Q = extreme_eigenpairs(W @ moments @ W.mT, r, end)[1].to(W)
    return Q.mT @ W, Q
