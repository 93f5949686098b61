"""Measures that compare an update with the singular spectrum of the weight it updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from milora_lightning.linalg.products import in_double, product_svd
from milora_lightning.linalg.singular import SingularSlice


def similarity(A: Tensor, B: Tensor) -> float:
    """Compute the similarity of two subspaces, φ = ‖AᵀB‖²_F / r.

    It is 1 if one contains the other and 0 if they are orthogonal. For random subspaces it is r / out on average, with
    r the larger of the two dimensions (LoRA, arXiv 2106.09685, section 7.2; MiLoRA, arXiv 2406.09044, section 5.3).

    Args:
        A: Orthonormal columns, shape (out, a).
        B: Orthonormal columns, shape (out, b).

    Returns:
        ‖AᵀB‖²_F / min(a, b).

    >>> E = torch.eye(4)
    >>> similarity(E[:, :2], E[:, :2]), similarity(E[:, :2], E[:, 1:3]), similarity(E[:, :1], E[:, 3:])
    (1.0, 0.5, 0.0)
    """
    return ((A.mT @ B).square().sum() / min(A.shape[1], B.shape[1])).item()


def reference_subspaces(left: Tensor, r: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Choose the left singular vectors of a weight to compare an update with.

    Args:
        left: All left singular vectors, shape (out, k), in descending order of singular values.
        r: How many to choose.
        generator: CPU generator for the random choice.

    Returns:
        The first r as ``"top"``, the last r as ``"bottom"``, and r drawn without replacement as ``"random"``, each of
        shape (out, r).
    """
    drawn = torch.randperm(left.shape[1], generator=generator, device="cpu")[:r].to(left.device)
    return {"top": left[:, :r], "bottom": left[:, -r:], "random": left[:, drawn]}


@dataclass(frozen=True)
class Update:
    """A low-rank update ΔW, given by its nonzero singular values and their vectors.

    Attributes:
        U: Left singular vectors, shape (out, rank).
        S: Singular values in descending order, shape (rank,).
        Vh: Right singular vectors, shape (rank, in).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @staticmethod
    def of(B: Tensor, A: Tensor) -> Update:
        """Decompose ΔW = B A with factors (out, n) and (n, in), without computing the product."""
        U, S, Vh = product_svd(B, A)
        # Relative to the factors, not only to S, so that an update whose terms cancel counts as zero.
        scale = torch.linalg.matrix_norm(in_double(B)) * torch.linalg.matrix_norm(in_double(A))
        rank = int((torch.finfo(A.dtype).eps * scale < S).sum())
        return Update(U[:, :rank], S[:rank], Vh[:rank])

    def similarities(self, subspaces: dict[str, Tensor], r: int) -> dict[str, float]:
        """Compute φ of the top r left singular vectors with each subspace."""
        return {name: similarity(self.U[:, :r], in_double(vectors)) for name, vectors in subspaces.items()}

    def amplification(self, weight: Tensor, r: int) -> float:
        """Compute ‖UᵀΔWV‖_F / ‖UᵀWV‖_F, for the top r singular vectors U and V of ΔW."""
        inside = self.U[:, :r].mT @ in_double(weight) @ self.Vh[:r].mT
        return float(torch.linalg.vector_norm(self.S[:r]) / torch.linalg.matrix_norm(inside))

    def interference(self, left: Tensor, right: Tensor) -> float:
        """Compute ρ_k = ‖UᵀΔWV‖²_F / ‖ΔW‖²_F, the share of the update between principal singular vectors.

        It is 0 for an update that avoids these directions on either side, as in OPLoRA (arXiv 2510.13003), and 1 for
        one that changes nothing else; for random updates it is k² / (out · in) on average.

        Args:
            left: The first k left singular vectors U of the weight, shape (out, k).
            right: The first k right singular vectors V, shape (in, k).
        """
        inside = (in_double(left).mT @ self.U) * self.S @ (self.Vh @ in_double(right))
        return float(inside.square().sum() / self.S.square().sum())

    def energy(self, weight: SingularSlice, bins: int) -> tuple[Tensor, Tensor]:
        """Compute the distribution of ‖ΔW‖²_F along a weight's spectrum.

        Args:
            weight: All k singular triplets (uᵢ, σᵢ, vᵢ) of the weight.
            bins: Number of bins for the k singular directions, largest first; at most k.

        Returns:
            ‖uᵢᵀΔW‖² / ‖ΔW‖² and ‖ΔWvᵢ‖² / ‖ΔW‖², each summed over the directions of a bin, shape (bins,). Each sums
            to 1, minus the share of ΔW that lies in the null space of W on its longer side.
        """
        total = self.S.square().sum()
        left = ((in_double(weight.U).mT @ self.U) * self.S).square().sum(1) / total
        right = ((in_double(weight.Vh) @ self.Vh.mT) * self.S).square().sum(1) / total
        index = torch.arange(len(weight.S), device=left.device) * bins // len(weight.S)
        zeros = torch.zeros(bins, dtype=left.dtype, device=left.device)
        return zeros.index_add(0, index, left), zeros.index_add(0, index, right)
