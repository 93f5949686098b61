"""The layer's one operation: the bits of the plain formula, nothing out of date, and what it keeps of its input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.benchmarks import benchmark
from helpers.layers import IN, OUT, TOKENS, R, adapted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from milora_lightning import LoRAConfig, LoRALinear, initialize, inject
from milora_lightning.adapters.autograd import cast_stacks
from milora_lightning.adapters.factors import stack_factors

STARTS = ["milora", "pissa", "random", "middle", "lora"]


def formula(layer: LoRALinear, x: Tensor, toward: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients for the loss ½‖y − toward‖², product by product: factors are stacked, scaled, and cast."""
    A, B = (factor.detach() for factor in stack_factors(*layer.factors, layer.scaling, x.dtype))
    weight, bias, r = layer.base_layer.weight, layer.base_layer.bias, layer.r
    y = F.linear(x, weight, bias)
    hidden = x @ A.T
    y = torch.addmm(y, hidden, B.T)
    g = y - toward
    to_hidden = g @ B
    to_A = to_hidden if layer.initial_A is None else to_hidden[:, :r] + to_hidden[:, r:]
    grad_x = torch.addmm(g @ weight, to_hidden, A)
    grad_B = (hidden[:, :r].contiguous().T @ g).T.float() * layer.scaling
    return y, grad_x, (to_A.T @ x).float(), grad_B


@pytest.mark.parametrize("alpha", [1, 2])
@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_steps_are_those_of_the_formula_bit_for_bit(dtype: torch.dtype, init: str, alpha: float) -> None:
    torch.manual_seed(0)
    r, tokens = 8, 50
    model = nn.Sequential(nn.Linear(64, 96, dtype=dtype))
    (layer,) = inject(model, LoRAConfig(r=r, lora_alpha=alpha * r, init=init)).values()
    initialize(model)
    twin = copy.deepcopy(layer)
    optimizers = [torch.optim.AdamW([one.lora_A, one.lora_B], lr=1e-2) for one in (layer, twin)]
    for _ in range(20):
        x, toward = torch.randn(tokens, 64, dtype=dtype).requires_grad_(), torch.randn(tokens, 96, dtype=dtype)
        y = layer(x)
        y.backward(y.detach() - toward)
        want = formula(twin, x.detach(), toward)
        twin.lora_A.grad, twin.lora_B.grad = want[2:]
        for got, wanted in zip((y, x.grad, layer.lora_A.grad, layer.lora_B.grad), want, strict=True):
            assert torch.equal(got, wanted)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(layer.lora_A, twin.lora_A)
        assert torch.equal(layer.lora_B, twin.lora_B)
    assert layer.delta_weight().norm() > 0.1


@pytest.mark.parametrize("init", ["milora", "lora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_stacks_are_cast_bit_for_bit(dtype: torch.dtype, init: str) -> None:
    factors = adapted(init).factors
    for got, want in zip(cast_stacks(factors, dtype), stack_factors(*factors, dtype=dtype), strict=True):
        assert torch.equal(got, want)
        assert got.is_contiguous()


@torch.no_grad()
def in_place(layer: LoRALinear) -> None:
    layer.lora_B.add_(1)


@torch.no_grad()
def copied(layer: LoRALinear) -> None:
    layer.lora_A.copy_(torch.randn(R, IN))


def through_data(layer: LoRALinear) -> None:
    layer.lora_A.data.add_(1)


def replaced_data(layer: LoRALinear) -> None:
    layer.lora_A.data = torch.randn(R, IN)


def replaced(layer: LoRALinear) -> None:
    layer.lora_B = nn.Parameter(torch.randn(OUT, R))


def past_torch(layer: LoRALinear) -> None:
    """As extensions in C++ do, and FSDP2 when it gathers: no version counter tells."""
    np.asarray(layer.lora_B.detach()).__iadd__(1)


def without_counting(layer: LoRALinear) -> None:
    with torch.autograd._unsafe_preserve_version_counter(layer.lora_A):
        in_place(layer)


def loaded(layer: LoRALinear) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def assigned(layer: LoRALinear) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}, assign=True)


def started_again(layer: LoRALinear) -> None:
    layer.set_initial_factors(torch.randn(R, IN), torch.randn(OUT, R))
    through_data(layer)


def stepped(layer: LoRALinear) -> None:
    layer(torch.randn(TOKENS, IN)).square().sum().backward()
    torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1).step()


def averaged(layer: LoRALinear) -> None:
    """As averages of weights take the place of what they average."""
    average = copy.deepcopy(layer)
    in_place(average)
    for parameter, value in zip(layer.parameters(), average.parameters(), strict=True):
        parameter.data.copy_(value.data)


def rescaled(layer: LoRALinear) -> None:
    layer.scaling *= 3


CHANGES: list[Callable[[LoRALinear], None]] = [
    *(in_place, copied, through_data, replaced_data, replaced, past_torch, without_counting),
    *(loaded, assigned, started_again, stepped, averaged, rescaled),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_factors_are_those_of_the_next_call(change: Callable[[LoRALinear], None]) -> None:
    layer = adapted()
    x = torch.randn(TOKENS, IN)
    before = layer(x)
    change(layer)
    got, want = layer(x), layer.base_layer(x) + layer.update(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - before).norm() > 0.01 * before.norm()


def test_a_change_between_forward_and_backward_is_an_error() -> None:
    layer = adapted()
    y = layer(torch.randn(TOKENS, IN))
    in_place(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_beside_a_base_layer_with_its_own_code_the_update_is_the_same(dropout: float) -> None:
    """With hooks, which see the base layer's output and not the sum, or a weight that trains."""
    layer, other = (adapted(lora_dropout=dropout).train() for _ in range(2))
    seen: list[Tensor] = []
    other.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    results = []
    for one in (layer, other):
        torch.manual_seed(2)
        x = torch.ones(3, TOKENS, IN).requires_grad_()
        y = one(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, one.lora_A, one.lora_B))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[0], layer.base_layer(x))


def test_beside_such_a_layer_the_same_is_kept() -> None:
    layer = adapted(lora_dropout=0.4).train()
    layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    layer(x)  # the first makes constants that all share
    kept = benchmark("cost").kept_for_backward(lambda: layer(x), [*layer.parameters(), x])
    assert kept <= 4 * (TOKENS * 2 * R + 2 * R * (IN + OUT)) + TOKENS * IN  # and a mask


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_no_tokens_give_no_gradient(dropout: float) -> None:
    """As for an expert to which none is routed: products of nothing are zero, not what was in memory."""
    layer = adapted(dtype=torch.bfloat16, lora_dropout=dropout).train()
    layer(torch.empty(0, IN, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert not layer.lora_A.grad.any()
    assert not layer.lora_B.grad.any()


@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
def test_a_factor_that_is_frozen_gets_no_gradient(trained: str) -> None:
    layer, whole = adapted(), adapted()
    for name in ("lora_A", "lora_B"):
        getattr(layer, name).requires_grad_(name == trained)
    x = torch.randn(TOKENS, IN)
    for one in (layer, whole):
        one(x).square().sum().backward()
    assert torch.equal(getattr(layer, trained).grad, getattr(whole, trained).grad)
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {trained}


def test_gradients_of_batches_add_up() -> None:
    layer, whole = adapted(), adapted()
    x = torch.randn(4, TOKENS, IN)
    for part in x:
        layer(part).square().sum().backward()
    whole(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, whole.lora_A.grad)
    torch.testing.assert_close(layer.lora_B.grad, whole.lora_B.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("init", ["milora", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_computes_what_the_cpu_does_without_a_wait(dtype: torch.dtype, init: str) -> None:
    """It would show a mixed device, an operation that CUDA refuses, and one for which the host waits."""
    layer = adapted(init, dtype, lora_dropout=0.4)
    there = copy.deepcopy(layer).cuda()
    x, direction = torch.randn(3, TOKENS, IN, dtype=dtype), torch.randn(3, TOKENS, OUT, dtype=dtype)
    results = []
    for one in (layer.eval(), there.eval(), there.train()):
        device = one.lora_A.device
        inputs, toward = x.to(device).requires_grad_(), direction.to(device)
        one(inputs)  # what is made once for a device is made
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = one(inputs)
            found = torch.autograd.grad(y, (inputs, one.lora_A, one.lora_B), toward)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([value.float().cpu() for value in (y, *found)])
    for a, b in zip(results[1], results[0], strict=True):
        assert (a - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()
    assert not torch.equal(results[2][0], results[1][0])


# ---- An input that is a product ----


def gated(x: Tensor) -> Tensor:
    gate, up = x[..., :IN], x[..., IN:]
    return F.silu(gate) * up


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def gates(request: pytest.FixtureRequest) -> Iterator[Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, TOKENS, 2 * IN, dtype=request.param).requires_grad_()


def gradients(y: Tensor, layer: LoRALinear, x: Tensor) -> tuple[Tensor, ...]:
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_product_is_formed_again_to_the_bit(gates: Tensor, dropout: float) -> None:
    """Against an input that is no product, for the identity comes between."""
    layer = adapted(dtype=gates.dtype, lora_dropout=dropout).train()
    results = []
    for between in (lambda x: x, lambda x: x.view_as(x)):
        torch.manual_seed(2)
        results.append(gradients(layer(between(gated(gates))), layer, gates))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_product_is_not_kept() -> None:
    layer, gates = adapted(), torch.randn(TOKENS, 2 * IN, requires_grad=True)
    counted = benchmark("cost").kept_for_backward
    known = [*layer.parameters(), gates]
    of_product, of_another = (
        counted(lambda f=f: f(gated(gates)), known) for f in (layer, lambda x: layer(x.view_as(x)))
    )
    assert of_another - of_product == 4 * TOKENS * IN


def test_a_product_with_a_weight_is_kept() -> None:
    """As a norm's output is; FSDP2 may have freed the weight when backward comes to the adapter."""
    layer, weight, h = adapted(), nn.Parameter(torch.randn(IN)), torch.randn(TOKENS, IN, requires_grad=True)
    y = layer(weight * h)
    got_from = layer.lora_A, weight
    want = torch.autograd.grad(y.square().sum(), got_from, retain_graph=True)
    freed = y.grad_fn.saved_tensors
    assert all(saved is None or saved.data_ptr() != weight.data_ptr() for saved in freed)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.square().sum(), got_from), want, strict=True))


def test_a_product_that_was_written_to_is_kept(gates: Tensor) -> None:
    layer = adapted(dtype=gates.dtype)
    results = []
    for between in (lambda x: x, torch.clone):
        x = between(gated(gates))
        with torch.no_grad():
            x.add_(1)
        results.append(gradients(layer(x), layer, gates))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_products_of_which_nothing_is_kept() -> None:
    """Their graph is freed, or a factor was written to, so that they have no gradient; the adapter has."""
    layer, one = adapted(), torch.randn(TOKENS, IN, requires_grad=True)
    freed = one * one.exp()
    freed.sum().backward()
    factor = one.exp()
    spoilt = one * factor
    with torch.no_grad():
        factor.add_(1)
    for x in (freed, spoilt):
        got, want = (torch.autograd.grad(layer(x).sum(), layer.lora_A)[0] for x in (x, x.detach()))
        assert torch.equal(got, want)


@pytest.mark.parametrize("around", ["activation", "both"])
def test_recomputed_products_stay_recomputed(gates: Tensor, around: str) -> None:
    """Reading what a checkpoint keeps would recompute it in forward."""
    layer = adapted(dtype=gates.dtype)

    def both(gates: Tensor) -> Tensor:
        return layer(gated(gates))

    y = (
        checkpoint(both, gates, use_reentrant=False)
        if around == "both"
        else layer(checkpoint(gated, gates, use_reentrant=False))
    )
    for a, b in zip(gradients(y, layer, gates), gradients(both(gates), layer, gates), strict=True):
        assert torch.equal(a, b)


def test_offloaded_products_stay_offloaded(gates: Tensor) -> None:
    layer = adapted(dtype=gates.dtype)
    with torch.autograd.graph.save_on_cpu():
        y = layer(gated(gates))
    for a, b in zip(gradients(y, layer, gates), gradients(layer(gated(gates)), layer, gates), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", ["product", "gates"])
def test_second_derivatives_through_a_product(wanted: str) -> None:
    layer = adapted().double()
    gates = torch.randn(TOKENS, 2 * IN, dtype=torch.float64, requires_grad=True)
    results = []
    for call in (layer, lambda x: layer.base_layer(x) + layer.update(x)):
        x = gated(gates)
        inputs = {"product": x, "gates": gates}[wanted]
        (g,) = torch.autograd.grad(call(x).square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), (inputs, layer.lora_A, layer.lora_B)))
    for a, b in zip(*results, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b)
