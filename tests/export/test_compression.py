"""Factors of a lower rank: the best ones, balanced, of the shapes that are asked for."""

from __future__ import annotations

import pytest
import torch

from milora_lightning.export.compression import compress


@pytest.mark.parametrize(("out", "inner", "cols", "rank"), [(9, 6, 7, 3), (3, 6, 7, 5), (9, 6, 2, 6)])
def test_factors_are_the_best_and_balanced(out: int, inner: int, cols: int, rank: int) -> None:
    torch.manual_seed(0)
    B, A = torch.randn(out, inner, dtype=torch.float64), torch.randn(inner, cols, dtype=torch.float64)
    small_A, small_B, lost, energy = compress(B, A, rank)
    assert small_A.shape == (rank, cols)
    assert small_B.shape == (out, rank)
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    torch.testing.assert_close(small_B @ small_A, U[:, :rank] * S[:rank] @ Vh[:rank])
    torch.testing.assert_close(small_A @ small_A.mT, small_B.mT @ small_B)  # the same singular values in both
    assert lost == pytest.approx(S[rank:].square().sum().item(), abs=1e-12)
    assert energy == pytest.approx((B @ A).square().sum().item())
