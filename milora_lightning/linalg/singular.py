"""A slice of a weight's singular value decomposition, computed exactly without the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from milora_lightning.linalg.arguments import POSITIONS, Slice, check_slice
from milora_lightning.linalg.devices import Way, at_home, in_best_way
from milora_lightning.linalg.partial import certified_part
from milora_lightning.utils.errors import InvalidInputError


class SingularSlice(NamedTuple):
    """Selected singular triplets of a weight of shape (out, in); ``U * S @ Vh`` is their part of the weight.

    Attributes:
        U: Left singular vectors as columns, shape (out, r).
        S: Singular values in descending order, shape (r,).
        Vh: Right singular vectors as rows, shape (r, in).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


def singular_slice(
    weight: Tensor, r: int, which: Slice | float = "minor", generator: torch.Generator | None = None
) -> SingularSlice:
    """Compute r singular triplets of a weight.

    Of the k = min(out, in) triplets in descending order, MiLoRA trains the last r and keeps the others frozen (MiLoRA,
    arXiv 2406.09044, section 3). Only the requested triplets are computed. The wanted left vectors are spanned by
    eigenvectors of the short side's float64 Gram matrix, which come from a Krylov method if they are the smallest of a
    large matrix, and from LAPACK otherwise. A small SVD inside that span restores the accuracy that squaring has lost,
    and the residual bounds the error. If that bound does not certify singular values within 1e-6 (relative) and
    subspaces within 1e-8 (projectors) of a full float64 SVD, the full SVD is computed instead.

    On devices that are slow in float64, eigenvectors are computed in float32 and refined, or the work is done on the
    CPU, whichever is faster at the measured rates (:mod:`milora_lightning.linalg.devices`). If a device's library or
    memory fails, the CPU takes over, with a warning. The certificate is the same on every device.

    Args:
        weight: Floating-point weight of shape (out, in), on any device, in any layout. It is not modified.
        r: Number of triplets, from 1 to k.
        which: ``"minor"`` for the last r, ``"principal"`` for the first r, ``"middle"`` for those from index
            (k - r) // 2, ``"random"`` for r indices drawn without replacement, or a position from 0.0 (the first) to
            1.0 (the last): those from index ⌊position · (k - r)⌋.
        generator: CPU generator for ``"random"``; torch's default generator when None.

    Returns:
        U (out, r), S (r,) descending and Vh (r, in), without gradient, on the weight's device; float64, except on
        devices without float64 (mps), where the result of the float64 computation is rounded to float32.

    Raises:
        ValueError: If ``which`` is unknown.
        ValueError: If the weight is not a floating-point matrix.
        ValueError: If the weight is on the meta device.
        ValueError: If r is not between 1 and k.
        ValueError: If the weight holds NaN or infinite entries.

    >>> U, S, Vh = singular_slice(torch.diag(torch.tensor([4.0, 1.0, 2.0, 3.0])), r=2)
    >>> S
    tensor([2., 1.], dtype=torch.float64)
    >>> (U * S @ Vh).diagonal()
    tensor([0., 1., 2., 0.], dtype=torch.float64)
    """
    check_slice(weight, r, which)
    k = min(weight.shape)
    if which == "random":
        index = torch.randperm(k, generator=generator, device="cpu")[:r].sort().values
    else:
        start = int(POSITIONS.get(which, which) * (k - r))  # type: ignore[arg-type]
        index = torch.arange(start, start + r, device="cpu")
    triplets = in_best_way(
        lambda way: _triplets(weight.detach(), index, which, way), weight.device, (weight.shape[0], weight.shape[1]), r
    )
    return SingularSlice(*(at_home(x, weight.device) for x in triplets))


def _triplets(weight: Tensor, index: Tensor, which: Slice | float, way: Way) -> SingularSlice:
    """Compute the triplets at ``index``; the indices are consecutive unless ``which`` is ``"random"``."""
    # In this order: fewer bytes to move, and no float64 copy on the first device.
    W = weight.to(way.device).to(torch.float64)
    energy = torch.linalg.matrix_norm(W).square()
    if not energy.isfinite() and (bad := int(W.numel() - torch.isfinite(W).sum())):
        raise InvalidInputError(f"{bad} of the weight's {W.numel()} entries are NaN or infinite: check the checkpoint")

    tall = W.shape[0] > W.shape[1]
    if tall:
        W = W.mT  # short side first: the Gram matrix is (k, k)
    found = None if which == "random" else certified_part(W, energy, int(index[0]), len(index), way.single)
    U, S, Vh = _full(W, index) if found is None else found
    if tall:
        U, Vh = Vh.mT, U.mT
    # Contiguous copies: callers broadcast and save them, and a view would keep its larger base alive.
    return SingularSlice(*(x.clone(memory_format=torch.contiguous_format) for x in (U, S, Vh)))


def _full(W: Tensor, index: Tensor) -> SingularSlice:
    """Select the triplets at ``index`` from a full SVD.

    On the CPU: of the methods on other devices, one is inaccurate at this size and the other takes minutes.
    """
    U, S, Vh = torch.linalg.svd(W.cpu(), full_matrices=False)
    return SingularSlice(U[:, index], S[index], Vh[index])
