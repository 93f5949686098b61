"""The singular values of a product of factors are those of the whole matrix, whichever side is short."""

from __future__ import annotations

import pytest
import torch

from milora_lightning.linalg.products import product_svd


@pytest.mark.parametrize(("rows", "inner", "columns"), [(9, 3, 7), (3, 5, 8), (8, 5, 3), (4, 9, 6)])
def test_a_product_is_decomposed_without_forming_it(rows: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    U, S, Vh = product_svd(B, A)
    whole = B.double() @ A.double()
    size = min(rows, inner, columns)
    torch.testing.assert_close(S, torch.linalg.svdvals(whole)[:size])
    torch.testing.assert_close(U * S @ Vh, whole)
    for side in (U.T, Vh):
        torch.testing.assert_close(side @ side.T, torch.eye(size, dtype=torch.float64))
