"""Updates whose place in their weight's spectrum is known."""

from __future__ import annotations

import torch
from torch import Tensor

from milora_lightning.analysis.spectra import MatrixAnalysis, analyze_matrix
from milora_lightning.analysis.subspace import Update

OUT, IN, R = 96, 64, 6


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


class Planted:
    """A weight with the singular values 1, 1/2, 1/3, ..., and an update between chosen singular directions."""

    def __init__(self, out: int = OUT, in_features: int = IN) -> None:
        k = min(out, in_features)
        self.U, self.V = orthonormal(out, k, 0), orthonormal(in_features, k, 1)
        self.S = 1 / torch.arange(1, k + 1, dtype=torch.float64)
        self.weight = self.U * self.S @ self.V.T

    def analyze(self, left: Tensor, right: Tensor, gain: float = 3.0, bins: int = 8) -> MatrixAnalysis:
        """Analyze ΔW = gain · left C rightᵀ, for columns of U or V and a diagonal C between 0.5 and 1."""
        core = torch.linspace(1, 0.5, left.shape[1], dtype=torch.float64)
        found = analyze_matrix("layers.0.q", self.weight.float(), Update.of(gain * left * core, right.T), R, bins)
        assert found is not None
        return found
