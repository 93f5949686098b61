"""Eigenvectors at one end of a symmetric matrix are those of the whole decomposition."""

from __future__ import annotations

import pytest
import torch

from milora_lightning.linalg.symmetric import extreme_eigenpairs


def test_eigenvectors_at_both_ends() -> None:
    G = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    values, vectors = torch.linalg.eigh((G + G.T).double() / 2)
    for end, index in (("largest", slice(-3, None)), ("smallest", slice(3))):
        found, Q = extreme_eigenpairs(G, 3, end)
        torch.testing.assert_close(found, values[index].flip(0))
        wanted = vectors[:, index]
        torch.testing.assert_close(Q @ Q.T, wanted @ wanted.T)
        torch.testing.assert_close((Q.T @ G.double() @ Q).diagonal(), found)
    for r in (0, 13):
        with pytest.raises(ValueError, match="set r from 1 to 12"):
            extreme_eigenpairs(G, r, "largest")
    with pytest.raises(ValueError, match="NaN or infinite"):
        extreme_eigenpairs(G * torch.inf, 1, "largest")
