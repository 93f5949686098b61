"""How large updates are and what they do, against W and ΔW written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.layers import IN, OUT, adapted, relative_effects
from torch import nn

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.analysis.effect import EffectMeter, relative_effect
from milora_lightning.analysis.magnitude import product_norm, update_norms, update_size, weight_norms


def moved(layer: LoRALinear) -> LoRALinear:
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.add_(torch.randn_like(factor), alpha=0.1)
    return layer


def in_module(base: nn.Module, r: int = 4, **options: Any) -> LoRALinear:
    torch.manual_seed(0)
    model = nn.Sequential(base)
    (layer,) = inject(model, LoRAConfig(r=r, lora_alpha=6, target_modules=["0"], **options)).values()
    initialize(model)
    return moved(layer)


@pytest.mark.parametrize("init", ["milora", "lora", "mica", "olora", "orthogonal", "gaussian x minor"])
def test_norms_are_those_of_the_matrices(init: str) -> None:
    layer = adapted(init)
    assert update_norms(layer).item() == pytest.approx(layer.delta_weight().double().norm().item(), rel=1e-6)
    weight = layer.base_layer.weight.detach().double()
    assert weight_norms(layer).item() == pytest.approx(weight.norm().item(), rel=1e-12)
    size = update_size([layer], [weight_norms(layer)])
    assert size.item() == pytest.approx((layer.delta_weight().double().norm() / weight.norm()).item(), rel=1e-6)


def test_terms_that_cancel_leave_nothing() -> None:
    A, B = torch.randn(3, 40), torch.randn(50, 3)
    assert product_norm(torch.cat([B, B], 1), torch.cat([A, -A])) < 1e-6 * product_norm(B, A)


@pytest.mark.parametrize("groups", [1, 2])
def test_norms_of_convolutions_and_of_stacks(groups: int) -> None:
    conv = in_module(nn.Conv2d(4, 6, 3, groups=groups))
    assert update_norms(conv).item() == pytest.approx(conv.delta_weight().norm().item(), rel=1e-5)
    assert weight_norms(conv).item() == pytest.approx(conv.base_layer.weight.norm().item(), rel=1e-5)
    A, B = torch.randn(5, 2, 7), torch.randn(5, 8, 2)
    torch.testing.assert_close(product_norm(B, A).float(), torch.linalg.matrix_norm(B @ A))


def test_weights_of_zero_are_left_out_of_the_mean() -> None:
    layers = [adapted("lora"), adapted("lora")]
    norms = [weight_norms(layers[0]), torch.zeros((), dtype=torch.float64)]
    assert update_size(layers, norms) == update_size(layers[:1], norms[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [False, True])
def test_effect_is_the_mean_over_what_the_mask_leaves(dtype: torch.dtype, conv: bool) -> None:
    layer = adapted("milora", dtype, conv).eval()
    x = torch.randn(3, 5, IN).to(dtype)
    x[0, 0] *= 100  # one of the very large activations that some layers have weighs as much as the others
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    ratios = relative_effects(layer, x)
    for seen, kept in ((None, ratios), (mask, ratios[mask.bool()]), (torch.ones(3, 4), ratios)):
        total, count = relative_effect(layer, x, layer(x), seen).tolist()
        assert count == kept.numel()
        assert total / count == pytest.approx(kept.mean().item(), rel=1e-4 if dtype == torch.float32 else 0.02)


def test_inputs_of_which_the_weight_makes_nothing_are_left_out() -> None:
    """Such as padding that an embedding has set to zero: nothing is there that an update could be compared with."""
    layer, x = adapted().eval(), torch.randn(4, IN)
    x[1] = 0
    total, count = relative_effect(layer, x, layer(x)).tolist()
    others = relative_effects(layer, x[[0, 2, 3]])
    assert (total / count, count) == (pytest.approx(others.mean().item(), rel=1e-4), 3)


def test_effect_of_other_layers() -> None:
    conv, x = in_module(nn.Conv2d(4, 6, 3, padding=1)), torch.randn(2, 4, 5, 5)
    update = conv(x) - conv.base_layer(x)
    base = conv.base_layer(x) - conv.base_layer.bias[:, None, None]
    ratios = update.norm(dim=1) / base.norm(dim=1)
    total, count = relative_effect(conv, x, conv(x)).tolist()
    assert (total / count, count) == (pytest.approx(ratios.mean().item(), rel=1e-4), 50)
    assert relative_effect(conv, x[0], conv(x[0]))[1] == 25
    rows, ids = in_module(nn.Embedding(30, 16)), torch.tensor([[1, 2], [2, 29]])
    ratios = rows.delta_weight().T[ids].norm(dim=-1) / rows.base_layer.weight[ids].norm(dim=-1)
    total, count = relative_effect(rows, ids, rows(ids)).tolist()
    assert (total / count, count) == (pytest.approx(ratios.mean().item(), rel=1e-4), 4)


def test_effect_of_the_rows_that_attention_asks_for() -> None:
    """Queries and keys of other sequences are projected by a part of the packed weight, in autocast by its adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True))
    layer = inject(model, LoRAConfig(r=4, lora_alpha=6))["0.in_proj"]
    initialize(model)
    moved(layer)
    q, k = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    meter = EffectMeter({"in_proj": layer}, torch.device("cpu"))
    with meter.watching(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.eval()[0](q, k, k)
    delta, weight = layer.delta_weight().detach(), layer.base_layer.weight.detach()
    parts = ((q, slice(0, 16)), (k, slice(16, 48)))
    ratios = [(x @ delta[own].T).norm(dim=-1) / (x @ weight[own].T).norm(dim=-1) for x, own in parts]
    expected_mean = torch.cat([each.flatten() for each in ratios]).mean().item()
    assert meter.effects()["in_proj"].item() == pytest.approx(expected_mean, rel=0.03)
    assert meter.sums[0, 1] == 16


def test_meter_adds_up_calls_and_sees_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milora_lightning.analysis.effect.NUMBERS", 2 * OUT)  # several pieces, the last one smaller
    layer, other = adapted().eval(), adapted()
    x = torch.randn(7, IN)
    meter = EffectMeter({"a": layer, "b": other}, torch.device("cpu"))
    layer(x)
    with meter.watching(), torch.no_grad():
        layer(x[:5])
        layer(x[5:])
    layer(2 * x)
    assert {name: value.item() for name, value in meter.effects().items()} == {
        "a": pytest.approx(relative_effects(layer, x).mean().item(), rel=1e-4)
    }
    assert not layer._forward_hooks
