"""Products with W + L R equal those with the sum, whatever code multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from milora_lightning.adapters.low_rank_sum import LowRankSum
from milora_lightning.utils.errors import InvalidInputError

E, M, N, K = 3, 4, 8, 2
OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)  # the second matrix gets no row
MANY = torch.tensor([2, 0, 0, 1, 2])


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS, WIDE = made(5, M, seed=4), made(5, N, seed=5)
USES: dict[str, Callable[[Any], Tensor]] = {
    "linear": lambda W: F.linear(WIDE, W[1]),
    "linear with a bias": lambda W: F.linear(WIDE, W[torch.tensor(1)], torch.ones(M)),
    "each after the other": lambda W: sum(F.linear(WIDE, matrix) for matrix in W),
    "at": lambda W: ROWS @ W[1],
    "at, transposed": lambda W: WIDE @ W[1].T,
    "matmul": lambda W: torch.matmul(ROWS, W),
    "mm": lambda W: torch.mm(ROWS, W[0]),
    "at, on the left": lambda W: W[1] @ WIDE.T,
    "bmm": lambda W: torch.bmm(ROWS.expand(E, 5, M), W),
    "bmm, transposed": lambda W: torch.bmm(WIDE.expand(E, 5, N), W.transpose(1, 2)),
    "bmm, gathered, on the left": lambda W: torch.bmm(W[MANY], WIDE.unsqueeze(-1)),
    "bmm, gathered": lambda W: torch.bmm(ROWS.unsqueeze(1), W[MANY]),
    "grouped": lambda W: F.grouped_mm(ROWS, W, offs=OFFSETS),
    "grouped, transposed": lambda W: F.grouped_mm(WIDE, W.transpose(-2, -1), offs=OFFSETS),
    "einsum": lambda W: torch.einsum("ti,eoi->teo", WIDE, W),  # not known: from the sum
    "in a list": lambda W: torch.cat([W[0], W[2]]),
    "a part of it": lambda W: ROWS @ W[1][:, 2:],
    "a method that is not known": lambda W: W.sum(0) * 2,
    "converted": lambda W: (WIDE.double() @ W.to(torch.float64)[1].mT).float(),
}


@pytest.mark.parametrize("use", USES)
def test_products_and_gradients_are_those_with_the_sum(use: str) -> None:
    W, L, R = made(E, M, N), made(E, M, K, seed=1).requires_grad_(), made(E, K, N, seed=2).requires_grad_()
    got, want = USES[use](LowRankSum(W, L, R)), USES[use](W + L @ R)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weights = made(*want.shape, seed=3)
    gradients = [torch.autograd.grad((y * weights).sum(), (L, R)) for y in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", USES)
def test_an_update_of_zero_changes_no_bit(use: str) -> None:
    W = made(E, M, N)
    got = USES[use](LowRankSum(W, torch.zeros(E, M, K), made(E, K, N)))
    assert torch.equal(got, USES[use](W))


def test_dropout_acts_on_what_the_update_sees() -> None:
    W, L, R = torch.zeros(1, 1, 2000), torch.ones(1, 1, 1), torch.ones(1, 1, 2000)
    torch.manual_seed(0)
    y = F.linear(torch.ones(1, 2000), LowRankSum(W, L, R, dropout=0.25)[0])
    assert 1800 < y.item() < 2200
    assert y.item() != 2000
    with pytest.raises(InvalidInputError, match="lora_dropout to 0"):
        torch.einsum("eoi->o", LowRankSum(W, L, R, dropout=0.25))


FROM_THE_SUM = {"einsum", "in a list", "a part of it", "a method that is not known"}


@pytest.mark.parametrize("use", [use for use in USES if use not in FROM_THE_SUM])
def test_no_product_leaves_dropout_out(use: str) -> None:
    W, L, R = torch.zeros(E, M, N), made(E, M, K), made(E, K, N, seed=1)
    torch.manual_seed(0)
    first, other = (USES[use](LowRankSum(W, L, R, dropout=0.5)) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(USES[use](LowRankSum(W, L, R, dropout=0.5)), first)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, USES[use](LowRankSum(W, L, R)))


def test_shapes_and_kinds_are_those_of_the_weight() -> None:
    W = LowRankSum(made(E, M, N).bfloat16(), made(E, M, K).bfloat16(), made(E, K, N).bfloat16())
    assert (W.shape, W.dtype, W.device, W.ndim, W.size(0), len(W)) == (
        (E, M, N),
        torch.bfloat16,
        W.weight.device,
        3,
        E,
        E,
    )
