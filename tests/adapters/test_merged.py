"""Merged layers: the same outputs, a weight that is not touched, and never those of factors as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import IN, OUT, TOKENS, R, adapted
from torch import Tensor, nn

from milora_lightning import LoRAConfig, LoRALinear, adapters_disabled, adapters_merged, initialize, inject
from milora_lightning.adapters.factors import stack_factors
from milora_lightning.adapters.merged_product import merged_weight

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("init", ["milora", "lora"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_outputs_stay_the_same(dtype: torch.dtype, init: str, conv: bool) -> None:
    """Bit for bit in half precision, where a sum would round the update; the weight is never written."""
    layer = adapted(init, dtype, conv).to(dtype)
    x, weight, state = torch.randn(3, TOKENS, IN, dtype=dtype), layer.base_layer.weight.clone(), layer.state_dict()
    before = layer(x)
    layer.merge()
    assert layer.merged
    after = layer(x)
    half = dtype.itemsize == 2
    assert after.dtype == dtype
    torch.testing.assert_close(after, before, **({"rtol": 0, "atol": 0} if half else {"rtol": 1e-5, "atol": 1e-6}))
    assert torch.equal(after, before) == half  # it is another sum, formed in another order
    assert torch.equal(layer.base_layer.weight, weight)
    assert layer.state_dict().keys() == state.keys()
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_start_is_the_base_layer_bit_for_bit(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(IN, OUT, dtype=dtype))
    x = torch.randn(TOKENS, IN, dtype=dtype)
    before = model(x)
    inject(model, LoRAConfig(r=R))
    initialize(model)
    with adapters_merged(model):
        assert torch.equal(model(x), before)


@torch.no_grad()
def add_in_place(layer: LoRALinear) -> None:
    layer.lora_B.add_(1)


def load(layer: LoRALinear, assign: bool = False) -> None:
    state = {name: value + 1 for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=assign)


def train(layer: LoRALinear) -> None:
    layer(torch.randn(TOKENS, IN, dtype=layer.base_layer.weight.dtype)).square().sum().backward()
    torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1).step()


def replace(layer: LoRALinear) -> None:
    layer.lora_A = nn.Parameter(layer.lora_A.detach() + 1)


def set_data(layer: LoRALinear) -> None:
    layer.lora_A.data = layer.lora_A.data + 1


@torch.no_grad()
def change_base(layer: LoRALinear) -> None:
    layer.base_layer.weight.mul_(2)


@torch.inference_mode()
def in_inference_mode(layer: LoRALinear) -> None:
    layer.lora_B.mul_(2)


CHANGES: list[Callable[[LoRALinear], None]] = [
    *(add_in_place, load, lambda layer: load(layer, assign=True), train, replace, set_data, change_base),
    *(in_inference_mode, lambda layer: layer.to(torch.float64).to(torch.float32) and add_in_place(layer)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_factors_or_weights_are_merged_anew(change: Callable[[LoRALinear], None], dtype: torch.dtype) -> None:
    layer = adapted(dtype=dtype)
    x = torch.randn(TOKENS, IN).to(dtype)
    with torch.no_grad(), adapters_merged(layer):
        before = layer(x)
        with torch.enable_grad():
            change(layer)
        assert layer.merged
        x = x.to(layer.base_layer.weight.dtype)
        got = layer(x)
        layer.unmerge()
        torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-4)
        assert (got - before).norm() > 0.01 * before.norm()


def test_a_change_of_dtype_is_merged_anew() -> None:
    layer = adapted()
    x = torch.randn(TOKENS, IN, dtype=torch.bfloat16)
    with torch.no_grad(), adapters_merged(layer):
        layer.to(torch.bfloat16)
        merged = layer(x)
        layer.unmerge()
        assert torch.equal(merged, layer(x))


def test_gradients_are_those_of_the_factors() -> None:
    layer = adapted(lora_dropout=0.5)
    x = torch.randn(TOKENS, IN)
    wanted = torch.autograd.grad(layer.eval()(x).square().sum(), (layer.lora_A, layer.lora_B))
    with adapters_merged(layer):
        got = torch.autograd.grad(layer(x).square().sum(), (layer.lora_A, layer.lora_B))
        torch.manual_seed(0)
        dropped = layer.train()(x)
        with torch.no_grad():  # dropout stays on in training, whether gradients are wanted or not
            torch.manual_seed(0)
            assert torch.equal(layer(x), dropped)
            assert not torch.equal(layer(x), dropped)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@torch.no_grad()
def test_the_base_can_be_asked_within_the_context() -> None:
    layer = adapted()
    x = torch.randn(TOKENS, IN)
    before, base = layer(x), layer.base_layer(x)
    with adapters_merged(layer):
        merged = layer(x)
        with adapters_disabled(layer):
            assert torch.equal(layer(x), base)
        assert torch.equal(layer(x), merged)
    with adapters_disabled(layer), adapters_merged(layer):
        assert torch.equal(layer(x), base)
    torch.testing.assert_close(merged, before, rtol=1e-5, atol=1e-6)


def test_contexts_in_each_other_and_copies() -> None:
    layer = adapted()
    x = torch.randn(TOKENS, IN)
    with adapters_merged(layer):
        with adapters_merged(layer):
            pass
        assert layer.merged  # as the outer context has it
        other = copy.deepcopy(layer)
        add_in_place(other)
        with torch.no_grad():
            merged = other(x)
            other.unmerge()
            torch.testing.assert_close(merged, other(x), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(merged, layer(x))
    assert not layer.merged


@torch.no_grad()
def test_hooks_of_the_base_layer_are_called_all_the_same() -> None:
    layer = adapted()
    x = torch.randn(TOKENS, IN)
    with adapters_merged(layer):
        layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
        torch.testing.assert_close(layer(x), 2 * F.linear(x, layer.base_layer.weight, layer.bias) + layer.update(x))


@torch.no_grad()
def test_autocast_does_not_round_the_update() -> None:
    layer = adapted()
    x = torch.randn(TOKENS, IN)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with adapters_merged(layer):
            assert torch.equal(layer(x), before)


@torch.no_grad()
def test_products_that_round_their_inputs_do_not_round_the_update() -> None:
    layer = adapted()
    x = torch.randn(TOKENS, IN)
    for precision in ("medium", "high"):
        with float32_products(precision):
            before = layer(x)
            with adapters_merged(layer):
                assert torch.equal(layer(x), before)


def test_a_sum_in_half_precision_would_lose_small_updates() -> None:
    """Why it is not formed there: a first step's update is within 1 % beside the weight, and drowns in the sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))
    (layer,) = inject(model, LoRAConfig(r=16)).values()
    initialize(model)
    with torch.no_grad():
        layer.lora_A.add_(torch.randn_like(layer.lora_A), alpha=1e-4)
    exact = copy.deepcopy(layer).double().delta_weight()
    summed = layer.merged_weight().double() - layer.base_layer.weight.double()
    A, B = stack_factors(*layer.factors, 1.0, torch.bfloat16)
    assert ((B.double() @ A.double()) - exact).norm() < 0.01 * exact.norm()
    assert (summed - exact).norm() > 0.1 * exact.norm()


def test_sum_is_in_the_weights_layout() -> None:
    A, B, W = torch.randn(R, IN), torch.randn(OUT, R), torch.randn(OUT, IN)
    want: Tensor = W + 2 * B @ A
    torch.testing.assert_close(merged_weight(W, (A, B, None, None), 2.0, transposed=False), want)
    torch.testing.assert_close(merged_weight(W.T, (A, B, None, None), 2.0, transposed=True), want.T)


@pytest.mark.slow
def test_a_compiled_layer_computes_the_same() -> None:
    layer = adapted().eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(TOKENS, IN)
    with torch.no_grad():
        want = layer(x)
        with adapters_merged(layer):
            torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-6)
            layer.lora_B.add_(1)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
