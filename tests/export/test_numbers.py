"""What exports say in numbers: what compressing and rounding lose, and which settings differ from most."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import adapted
from helpers.models import tiny_model
from torch import nn

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.export.compression import compress
from milora_lightning.export.merging import merge_adapters, merged_state
from milora_lightning.export.peft_format import deviations, most_common


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_compressed_factors_are_the_best_of_their_rank_and_say_what_is_lost(rank: int) -> None:
    torch.manual_seed(0)
    B, A = torch.randn(9, 5), torch.randn(5, 7)
    small_A, small_B, lost, energy = compress(B, A, rank)
    assert (small_A.shape, small_B.shape) == ((rank, 7), (9, rank))
    assert energy == pytest.approx((B @ A).square().sum().item(), rel=1e-5)
    assert lost == pytest.approx((B @ A - small_B @ small_A).square().sum().item(), rel=1e-4, abs=1e-6)
    assert lost == pytest.approx(torch.linalg.svdvals(B @ A)[rank:].square().sum().item(), rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match=r"rank=6 is more than the adapters' 5"):
        compress(B, A, 6)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_adds_the_update_and_says_what_rounding_loses(dtype: torch.dtype, conv: bool) -> None:
    layer = adapted(dtype=dtype, conv=conv)
    model, x = nn.Sequential(layer), torch.randn(4, 16)
    weight = layer.base_layer.weight.detach().float()
    delta = layer.delta_weight().detach()
    delta = delta.T if conv else delta
    lost = merge_adapters(model)
    merged = model[0].weight.detach()
    assert merged.dtype == dtype
    assert torch.equal(merged, (weight + delta).to(dtype))
    expected = ((merged.float() - weight) - delta).norm() / delta.norm()
    assert lost == pytest.approx(expected.item(), rel=1e-3, abs=1e-7)
    assert (lost > 1e-3) == (dtype == torch.bfloat16)
    assert model(x.to(dtype)).dtype == dtype


def test_patterns_name_what_differs_from_most_and_long_names_first() -> None:
    values = {"a.q": 4, "b.q": 8, "b.k": 8, "a.long.q": 2, "c.q": 8}
    assert most_common(values) == 8
    assert list(deviations(values, 8).items()) == [("a.long.q", 2), ("a.q", 4)]


def test_all_of_a_merged_model_has_the_dtype_asked_for_biases_too() -> None:
    model = tiny_model("gpt2")
    names = model.state_dict().keys()
    inject(model, LoRAConfig(r=2))
    initialize(model)
    for dtype in (None, torch.bfloat16):
        state, lost = merged_state(model, dtype)
        assert state.keys() == names
        assert {value.dtype for value in state.values()} == {dtype or torch.float32}
        assert lost == 0  # nothing was trained yet
