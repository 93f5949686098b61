"""Weight and update multiplied as one matrix: the same function as one after the other, where it is exact."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora_lightning import LoRAConfig, LoRALinear, initialize, inject
from milora_lightning.folded import folded_lora, folded_weight, folding_pays
from milora_lightning.fused import fused_lora, stacked_factors

OUT, IN, R = 24, 16, 4
FEW, MANY = 19, 20  # tokens on either side of 2·in·out / (in + out)


def layer_of(init: str = "milora", conv: bool = False, moved: bool = True, **options: float) -> LoRALinear:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT))
    (layer,) = inject(model, LoRAConfig(r=R, lora_alpha=6, init=init, **options)).values()
    initialize(model)
    if moved:
        with torch.no_grad():
            layer.lora_A.add_(torch.randn(R, IN), alpha=0.1)
            layer.lora_B.add_(torch.randn(OUT, R), alpha=0.1)
    return layer


def is_folded(y: Tensor) -> bool:
    """Whether this output comes from the operation under test, which may be under a view."""
    node = y.grad_fn
    while node is not None and "LoRA" not in node.name():
        node = node.next_functions[0][0]
    assert node is not None
    return "FoldedLoRA" in node.name()


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("init", ["milora", "lora"])
def test_gradcheck_in_float64(init: str, conv: bool) -> None:
    layer = layer_of(init, conv).double()
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    base = layer.base_layer

    def folded(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return folded_lora(x, base.weight, base.bias, A, B, layer.initial_A, layer.initial_B, 1.7, conv)

    assert torch.autograd.gradcheck(folded, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("init", ["milora", "lora"])
def test_equals_one_after_the_other(init: str, conv: bool) -> None:
    layer = layer_of(init, conv)
    base, factors = layer.base_layer, (layer.lora_A, layer.lora_B, layer.initial_A, layer.initial_B)
    x = torch.randn(3, MANY, IN, requires_grad=True)
    direction = torch.randn(3, MANY, OUT)
    folded = folded_lora(x, base.weight, base.bias, *factors, layer.scaling, conv)
    fused = fused_lora(x, base.weight, base.bias, *factors, None, layer.scaling, conv)
    torch.testing.assert_close(folded, fused, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(folded, (x, layer.lora_A, layer.lora_B), direction),
        torch.autograd.grad(fused, (x, layer.lora_A, layer.lora_B), direction),
        strict=True,
    ):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_layer_folds_for_many_tokens_and_without_dropout() -> None:
    layer = layer_of()
    assert is_folded(layer(torch.randn(MANY, IN)))
    assert is_folded(layer(torch.randn(4, MANY // 4, IN)))
    assert not is_folded(layer(torch.randn(FEW, IN)))
    dropping = layer_of(lora_dropout=0.5)
    assert not is_folded(dropping.train()(torch.randn(MANY, IN)))
    assert is_folded(dropping.eval()(torch.randn(MANY, IN)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_never_folded(dtype: torch.dtype) -> None:
    layer = layer_of()
    assert not folding_pays(torch.empty(MANY, IN, dtype=dtype), layer.base_layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_folded(layer(torch.randn(MANY, IN)))


def test_folding_in_half_precision_would_lose_small_updates() -> None:
    """Why it is not done there: a first step's update is within 1 % one after the other, and drowns in the sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))
    (layer,) = inject(model, LoRAConfig(r=16)).values()
    initialize(model)
    with torch.no_grad():
        layer.lora_A.add_(torch.randn_like(layer.lora_A), alpha=1e-4)
    exact = copy.deepcopy(layer).double().delta_weight()
    weight = layer.base_layer.weight
    A, B = stacked_factors(layer.lora_A, layer.lora_B, layer.initial_A, layer.initial_B, 1.0, torch.bfloat16)
    summed = folded_weight(weight, A, B, transposed=False).double() - weight.double()
    assert ((B.double() @ A.double()) - exact).norm() < 0.01 * exact.norm()
    assert (summed - exact).norm() > 0.1 * exact.norm()


def test_products_that_round_their_inputs_are_not_folded() -> None:
    x, weight = torch.empty(MANY, IN), torch.empty(OUT, IN)
    assert folding_pays(x, weight)
    torch.set_float32_matmul_precision("medium")
    try:
        assert not folding_pays(x, weight)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("conv", [False, True])
def test_start_is_the_base_layer_bit_for_bit(conv: bool) -> None:
    layer = layer_of(conv=conv, moved=False)
    x = torch.randn(MANY, IN)
    y = layer(x)
    assert is_folded(y)
    assert torch.equal(y, layer.base_layer(x))


def test_only_the_input_is_saved_for_backward() -> None:
    layer = layer_of()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(MANY, IN, requires_grad=True))
    parameters = {p.data_ptr() for p in layer.parameters()}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in parameters] == [(MANY, IN)]


def test_frozen_factors_and_inputs_get_no_gradients() -> None:
    layer = layer_of()
    layer.lora_A.requires_grad_(False)
    x = torch.randn(MANY, IN)
    layer(x).sum().backward()
    assert layer.lora_A.grad is None
    scaled = layer.scaling * (x @ layer.lora_A.T).sum(0)
    torch.testing.assert_close(layer.lora_B.grad, scaled.detach().expand(OUT, R), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_layer_computes_the_same_on_both_sides() -> None:
    """In one graph for each side of the threshold, and again as lengths change."""
    layer = layer_of().train()
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (MANY, 3 * MANY, FEW, FEW - 5, 2 * MANY):
        x = torch.randn(tokens, IN, requires_grad=True)
        wanted = (x, layer.lora_A, layer.lora_B)
        got, want = compiled(x), layer(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), wanted),
            torch.autograd.grad(want.square().sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sum_is_in_the_weights_layout() -> None:
    A, B, W = torch.randn(R, IN), torch.randn(OUT, R), torch.randn(OUT, IN)
    torch.testing.assert_close(folded_weight(W, A, B, transposed=False), W + B @ A)
    torch.testing.assert_close(folded_weight(W.T, A, B, transposed=True), (W + F.linear(B, A.T)).T)
