"""Intruder dimensions and interference, where they have been planted, and against PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn

from milora_lightning import LoRAConfig, initialize, inject, lora_layers
from milora_lightning.analysis.intruders import Intruders, corrections, find_intruders
from milora_lightning.analysis.spectra import analyze_matrix, update_of
from milora_lightning.analysis.subspace import Update

OUT, IN = 60, 40


def weight() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight with the singular values 40, 39, ... 1, and their vectors."""
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(OUT, IN, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=torch.float64))
    S = torch.arange(IN, 0, -1, dtype=torch.float64)
    return U * S @ V.T, U, S, V


def test_a_new_direction_among_the_largest_is_found_and_an_old_one_is_not() -> None:
    W, U, _, V = weight()
    new = torch.linalg.qr(torch.cat([U, torch.randn(OUT, 1, dtype=torch.float64)], 1)).Q[:, -1:]
    spread = V.mean(1, keepdim=True)
    spread /= spread.norm()
    tuned = W + 200 * new @ spread.T
    found = find_intruders(W, tuned, U, Intruders())
    assert len(found.S) == 1
    assert (found.U.T @ new).abs().item() > 0.95
    torch.testing.assert_close(found.S, torch.linalg.svdvals(tuned)[:1], rtol=1e-6, atol=0)
    assert len(find_intruders(W, W + 50 * U[:, 3:4] @ V[:, 3:4].T, U, Intruders()).S) == 0
    assert len(find_intruders(W, W + 0.5 * new @ V[:, -1:].T, U, Intruders()).S) == 0  # not among the largest
    assert len(find_intruders(W, tuned, U, Intruders(threshold=0.01)).S) == 0


def test_interference_is_that_of_the_subspaces() -> None:
    W, U, _, V = weight()

    def rho(left: Tensor, right: Tensor, k: int) -> float:
        found = analyze_matrix("q", W, Update.of(left, right.T), r=2, k=k)
        assert found is not None
        assert found.k == k
        return found.interference

    assert rho(U[:, -4:], V[:, -4:], 10) == pytest.approx(0, abs=1e-10)  # within the minor subspace
    assert rho(U[:, :4], V[:, :4], 10) == pytest.approx(1)
    assert rho(U[:, :4], V[:, -4:], 10) == pytest.approx(0, abs=1e-10)  # on one side alone
    assert rho(U[:, 8:12], V[:, 8:12], 10) == pytest.approx(0.5)
    left, right = torch.randn(OUT, 3, dtype=torch.float64), torch.randn(IN, 3, dtype=torch.float64)
    dense = left @ right.T
    expected = ((U[:, :10].T @ dense @ V[:, :10]).norm() / dense.norm()).square().item()
    assert rho(left, right, 10) == pytest.approx(expected, rel=1e-6)


def test_no_more_directions_are_taken_than_the_strict_variant_protects() -> None:
    W, U, _, V = weight()
    found = analyze_matrix("q", W, Update.of(U[:, -4:], V[:, -4:].T), r=4)
    assert found is not None
    assert (found.k, found.interference) == (IN - 4, pytest.approx(0, abs=1e-10))


@pytest.mark.parametrize("keep", [0.75, 0.0])
def test_shrunk_updates_are_peft_s(keep: float) -> None:
    """PEFT shrinks a LoRA adapter on a copy of the model, and cuts the result to rank r; ours before that cut."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1"], init_lora_weights=False)
    peft = get_peft_model(nn.Sequential(*(nn.Linear(x.in_features, x.out_features) for x in net)), config)
    layers = inject(net, LoRAConfig(r=4, lora_alpha=8, init="lora"))
    initialize(net)
    with torch.no_grad():
        for name, layer in layers.items():
            other = peft.base_model.model[int(name)]
            other.base_layer.load_state_dict(layer.base_layer.state_dict())
            layer.lora_A.copy_(other.lora_A["default"].weight)
            layer.lora_B.copy_(other.lora_B["default"].weight)
    reduce_intruder_dimension(peft, mitigation_lambda=keep, logging_sink=None)
    found = corrections(lora_layers(net), Intruders(keep=keep))
    assert len(found) == 2
    for name, layer in layers.items():
        left, right = found[layer]
        ours = layer.delta_weight() + left @ right
        cut = Update.of(ours, torch.eye(ours.shape[1]))
        theirs = peft.base_model.model[int(name)].get_delta_weight("intruder_reduced")
        torch.testing.assert_close((cut.U[:, :4] * cut.S[:4] @ cut.Vh[:4]).float(), theirs, rtol=1e-3, atol=1e-4)
        tuned = layer.base_layer.weight + layer.delta_weight()
        before, after = (torch.linalg.svdvals(x.detach()).sort().values for x in (tuned, tuned + left @ right))
        assert (before.sum() - after.sum()).item() == pytest.approx(
            (1 - keep) * torch.linalg.svdvals((left @ right).detach() / (keep - 1)).sum().item(), rel=1e-4
        )


def test_where_there_are_no_intruders_nothing_is_changed() -> None:
    net = nn.Sequential(nn.Linear(IN, OUT))
    inject(net, LoRAConfig(r=4))
    initialize(net)
    assert corrections(lora_layers(net), Intruders()) == {}
    assert len(update_of(lora_layers(net)["0"]).S) == 0


@pytest.mark.parametrize("options", [{"keep": 1.5}, {"keep": -0.1}, {"top_k": 0}, {"threshold": 0.0}])
def test_settings_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        Intruders(**options)
