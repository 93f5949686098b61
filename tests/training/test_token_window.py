"""The gradient of several batches is that of the mean over all of their tokens, whichever batches have none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from milora_lightning.training.accumulation import TokenWindow
from milora_lightning.training.optimization import OptimizedModule

few = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
batch = st.tuples(st.integers(-9, 9), st.integers(0, 50))


def accumulated(window: TokenWindow, batches: list[tuple[int, int]]) -> tuple[float, list[float]]:
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    factors = []
    for slope, tokens in batches:
        factors.append(window.add(torch.tensor(tokens)))
        (slope * weight * factors[-1]).backward()
    window.average([weight, nn.Parameter(torch.zeros(2))])  # the other one got no gradient
    return weight.grad.item(), [float(factor) for factor in factors]


@few
@given(st.lists(batch, min_size=1, max_size=6))
@example([(5, 0), (2, 3), (7, 9)])
@example([(5, 0), (2, 0)])
def test_every_token_of_a_step_has_the_same_weight(batches: list[tuple[int, int]]) -> None:
    window = TokenWindow()
    for _ in range(2):  # the second step has forgotten the first
        gradient, factors = accumulated(window, batches)
        total = sum(tokens for _, tokens in batches)
        mean = sum(slope * tokens for slope, tokens in batches) / max(total, 1)
        assert gradient == pytest.approx(mean, rel=1e-6, abs=1e-6)
        filled = [factor for factor, (_, tokens) in zip(factors, batches, strict=True) if tokens]
        assert filled[:1] in ([], [1.0])  # the first loss keeps its scale, as a GradScaler needs it
        window.clear()


@few
@given(st.lists(batch, min_size=2, max_size=6))
def test_without_a_new_beginning_the_last_steps_tokens_would_count(batches: list[tuple[int, int]]) -> None:
    assume(sum(tokens for _, tokens in batches) and sum(slope * tokens for slope, tokens in batches))
    window = TokenWindow()
    first, _ = accumulated(window, batches)
    again, _ = accumulated(window, batches)
    assert abs(again) < abs(first)


@pytest.mark.parametrize("shares", [[(6.0, 3), (2.0, 1)], [(6.0, 5), (0.0, 0)], [(0.0, 0), (0.0, 0)]])
def test_the_average_over_ranks_is_the_mean_over_all_of_their_tokens(shares: list[tuple[float, int]]) -> None:
    """As DDP averages the gradients of its ranks: each rank's loss is scaled so that this is right."""

    class Rank(OptimizedModule):
        trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=len(shares),
            strategy=SimpleNamespace(reduce=lambda _, reduce_op: torch.tensor(sum(n for _, n in shares))),
        )

    module = Rank(lambda p: torch.optim.SGD(p, lr=1.0), "constant", 0, None, None)
    losses = [module.mean_over_ranks(torch.tensor(total), torch.tensor(tokens)) for total, tokens in shares]
    mean = sum(total for total, _ in shares) / max(sum(tokens for _, tokens in shares), 1)
    assert torch.stack(losses).mean().item() == pytest.approx(mean)
