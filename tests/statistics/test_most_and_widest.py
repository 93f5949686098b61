"""The largest rank that a layer may get, and the layer that is named where there are too few tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from milora_lightning import LoRAConfig, collect_statistics, inject
from milora_lightning.starts import Statistics
from milora_lightning.statistics import ranks_by_variance


@pytest.mark.parametrize(("rho", "most"), [(1.16, 29), (1.0, 25), (1.6, 40)])
def test_the_largest_rank_is_rho_times_the_mean_rank_whatever_floating_point_makes_of_it(rho: float, most: int) -> None:
    """25 · 1.16 is 28.999999999999996 there."""
    thin, wide = torch.zeros(40, 40), torch.eye(40)
    thin[0, 0] = 1.0
    assert ranks_by_variance({"thin": Statistics(thin), "wide": Statistics(wide)}, r=25, rho=rho) == {
        "thin": 50 - most,
        "wide": most,
    }


@pytest.mark.parametrize("tokens", [3, 7, 9])
def test_of_layers_with_too_few_tokens_the_widest_is_named(tokens: int) -> None:
    model = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 8), nn.Linear(8, 2))
    inject(model, LoRAConfig(r=2, init="eva"))
    with pytest.warns(UserWarning, match=rf"of {tokens} tokens leave .* the 10 directions .* layer '1'"):
        collect_statistics(model, [torch.randn(tokens, 4)])


@pytest.mark.parametrize("constant", [torch.zeros(6, 6), torch.full((6, 6), 4.0)])
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_whose_inputs_are_always_the_same_gets_the_least(constant: torch.Tensor, first: bool) -> None:
    """Nothing of them is to be explained, wherever the layer stands."""
    same = {"same": Statistics(constant, mean=constant[0].sqrt())}
    others = {name: Statistics(torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 1.0]))) for name in ("a", "b")}
    ranks = ranks_by_variance({**same, **others} if first else {**others, **same}, r=2)
    assert ranks["same"] == 1
    assert sum(ranks.values()) == 6
    assert abs(ranks["a"] - ranks["b"]) <= 1
