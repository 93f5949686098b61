"""What is certified is exact to 1e-8, however close the nearest other triplet is; and what is exact is certified."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from milora_lightning.linalg.certificate import Candidate, certified_triplets

K, N, R, EXTRA = 24, 30, 3, 4


def tilted_candidate(gap: float, angle: float, which: str, at: str) -> tuple[Tensor, int, Candidate, Tensor]:
    """A weight, and eigenvectors of its slice, one of which is turned towards one outside by an angle.

    The ``gap`` is the relative distance from each of the slice to the next, up to the one outside.
    """
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, K, dtype=torch.float64, generator=generator)).Q for size in (K, N))
    S = torch.linspace(9, 5, K, dtype=torch.float64)
    above, below = {"smallest": (EXTRA, 0), "largest": (0, EXTRA), "middle": (1, 7) if at == "above" else (7, 1)}[which]
    start = {"smallest": K - R, "largest": 0, "middle": 12}[which]
    low, high = start - above, start + R + below
    around = torch.arange(max(low - 1, 0), min(high + 1, K))
    S[around] = S[around[0]] * (1 - gap) ** (around - around[0]).double()
    S[high + 1 :] = torch.linspace(0.9, 0.7, K, dtype=torch.float64)[high + 1 :] * S[around[-1]]
    wanted, outside = {"above": (start, low - 1), "below": (start + R - 1, high)}[at]
    vectors = U.clone()
    vectors[:, wanted] = torch.cos(torch.tensor(angle)) * U[:, wanted] + torch.sin(torch.tensor(angle)) * U[:, outside]
    W = (U * S) @ V.mT
    cholesky = torch.linalg.cholesky(W @ W.mT) if which == "smallest" else None
    candidate = Candidate(low, high, S[low:high].square().flip(0), vectors[:, low:high].flip(1), cholesky)
    return W, start, candidate, U[:, start : start + R]


@pytest.mark.parametrize(
    ("which", "at"), [("smallest", "above"), ("largest", "below"), ("middle", "above"), ("middle", "below")]
)
@pytest.mark.parametrize("gap", [1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("angle", [0, 1e-10, 1e-9, 2e-8, 1e-7, 1e-6])
def test_what_is_certified_is_exact(which: str, at: str, gap: float, angle: float) -> None:
    W, start, candidate, exact = tilted_candidate(gap, angle, which, at)
    found = certified_triplets(W, W.square().sum(), start, R, candidate)
    assert (found is None) == (angle > 1e-8)
    if found is not None:
        U, S, Vh = found
        assert torch.linalg.matrix_norm(U @ U.mT - exact @ exact.mT) < 1e-8
        torch.testing.assert_close(U.mT @ W, S[:, None] * Vh, rtol=0, atol=1e-7)
