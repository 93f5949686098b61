"""Numbers of analyses: which directions they are compared with, what counts, and how they are averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.layers import IN, adapted
from torch import Tensor, nn

from milora_lightning import LoRAConfig
from milora_lightning.adapters.contexts import adapters_disabled
from milora_lightning.analysis import intruders
from milora_lightning.analysis.effect import EffectMeter
from milora_lightning.analysis.intruders import Intruders, corrections, find_intruders
from milora_lightning.analysis.ranks import default_slice, ranks_by_share, shares
from milora_lightning.analysis.spectra import MatrixAnalysis, analyze_matrix, reference_vectors
from milora_lightning.analysis.subspace import Update
from milora_lightning.analysis.tables import averages, by_type


def analysis(name: str = "layers.0.q_proj", rank: int = 2, r: int = 3, k: int = 128) -> MatrixAnalysis:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 7, generator=generator)
    update = Update.of(torch.randn(9, rank, generator=generator), torch.randn(rank, 7, generator=generator))
    found = analyze_matrix(name, weight, update, r, k=k)
    assert found is not None
    return found


def test_no_more_directions_are_compared_than_an_update_has() -> None:
    found = analysis(rank=2, r=5)
    assert (found.r, found.k, found.similarity["expected"]) == (2, 5, 2 / 9)
    assert analysis(rank=4, r=3).r == 3
    assert [analysis(k=k).k for k in (1, 5, 6)] == [1, 5, 5]  # all but r at most


def test_relative_norms_are_of_whole_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, B, A = (torch.randn(*shape, generator=generator) for shape in ((9, 7), (9, 2), (2, 7)))
    assert analysis().relative_norm == pytest.approx((B @ A).norm().item() / weight.norm().item(), rel=1e-5)


def test_random_directions_are_those_of_the_layers_name() -> None:
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    one, again, other = (reference_vectors(name, weight, 3, 2).subspaces for name in ("a.q", "a.q", "b.q"))
    assert torch.equal(one["random"], again["random"])
    assert not torch.equal(one["random"], other["random"])
    assert torch.equal(one["top"], other["top"])
    drawn = reference_vectors("a.q", weight, 7, 2).subspaces["random"]
    gram = drawn.mT @ drawn
    torch.testing.assert_close(gram, torch.eye(7, dtype=gram.dtype))  # drawn without replacement


def test_adapters_that_are_off_have_no_effect_to_measure() -> None:
    layer = adapted().eval()
    meter = EffectMeter({"a": layer}, torch.device("cpu"))
    with meter.watching(), torch.no_grad():
        with adapters_disabled(layer):
            layer(torch.randn(3, IN))
        assert meter.effects() == {}
        layer(torch.randn(5, IN))
        layer(input=torch.randn(4, IN))
    assert meter.sums[0, 1] == 9


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 6, 9)])
def test_shares_of_slices_are_of_the_energy_of_either_end(shape: tuple[int, ...]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    energies = torch.linalg.svdvals(weight.double().reshape(-1, *shape[-2:])).square()
    parts = energies / energies.sum(-1, keepdim=True)
    torch.testing.assert_close(shares(weight, "principal"), parts.cumsum(-1).mean(0))
    torch.testing.assert_close(shares(weight, "minor"), parts.flip(-1).cumsum(-1).mean(0))
    assert shares(torch.zeros(4, 5), "minor").tolist() == [1.0] * 4


def test_the_largest_rank_may_be_given() -> None:
    even, steep = torch.linspace(0.1, 1, 10), torch.linspace(0, 1, 10) ** 4
    layers = {"even": even, "steep": steep}
    assert ranks_by_share(layers, 2) == {"even": 1, "steep": 3}
    assert ranks_by_share(layers, 2, most=2) == {"even": 2, "steep": 2}
    assert ranks_by_share(layers, 3, most=1) == {"even": 1, "steep": 1}
    for init, which in (("olora", "principal"), ("principal x minor", "principal"), ("minor x principal", "minor")):
        assert default_slice(LoRAConfig(init=init)) == which


def test_blocks_are_in_the_order_of_their_numbers_and_an_effect_of_zero_counts() -> None:
    effects = {"layers.10.q": 0.5, "layers.2.q": 0.0, "layers.1.q": None, "layers.0.experts.up[3]": None}
    matrices = [replace(analysis(), layer=name, effect=effect) for name, effect in effects.items()]
    assert {t: [m.layer for m in of] for t, of in by_type(matrices).items()} == {
        "q": ["layers.1.q", "layers.2.q", "layers.10.q"],
        "up": ["layers.0.experts.up[3]"],
    }
    assert averages(matrices)["update_effect"] == 0.25
    changed = [matrices[0], replace(matrices[0], amplification=matrices[0].amplification + 2)]
    assert averages(changed)["amplification"] == pytest.approx(matrices[0].amplification + 1)


def test_intruders_may_be_kept_not_at_all_or_whole() -> None:
    assert [Intruders(keep).keep for keep in (0, 1)] == [0, 1]
    assert Intruders(threshold=1.0).threshold == 1


class Stack:
    """Stands for the adapter of a stack of experts."""

    base_layer = nn.Linear(1, 1)
    scaling = 1.5

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.factors = A, B, None, None


@pytest.mark.parametrize("larger", [0, 2])
def test_experts_with_different_numbers_of_intruders_have_each_its_own(
    larger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, A, B = (torch.randn(*shape, generator=generator) for shape in ((3, 9, 7), (3, 2, 7), (3, 9, 2)))
    B *= torch.tensor([0.0, 3.0, 3.0] if larger else [3.0, 3.0, 0.0])[:, None, None]  # one expert has not changed
    B[1, :, 1] = 0
    monkeypatch.setattr(intruders, "dense_weight", lambda layer: weight)
    layer: Any = Stack(A, B)
    rule = Intruders(keep=0.25, top_k=3, threshold=0.9)
    left, right = corrections({"experts": layer}, rule)[layer]
    numbers = []
    for expert in range(3):
        tuned = weight[expert] + 1.5 * B[expert] @ A[expert]
        vectors = torch.linalg.svd(weight[expert], full_matrices=False)[0]
        found = find_intruders(weight[expert], tuned, vectors, rule)
        expected = -0.75 * (found.U * found.S @ found.Vh)
        torch.testing.assert_close((left[expert] @ right[expert]).double(), expected.double(), rtol=1e-4, atol=1e-4)
        numbers.append(len(found.S))
    assert len(set(numbers)) > 1
    assert left.shape[-1] == right.shape[-2] == max(numbers)
