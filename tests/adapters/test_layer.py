"""The adapter layer against the plain formula, in every setting it has to work in."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import IN, OUT, TOKENS, R, adapted, plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from milora_lightning import LoRAConfig, LoRALinear, adapters_disabled, initialize, inject
from milora_lightning.adapters.autograd import lora_linear
from milora_lightning.adapters.dropout import draw_mask


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("init", ["milora", "lora"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_in_float64(init: str, conv: bool, p: float) -> None:
    layer = adapted(init, conv=conv).double()
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    weight, bias = layer.base_layer.weight, layer.base_layer.bias

    def fused(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_linear(x, weight, bias, A, B, layer.initial_A, layer.initial_B, 1.7, p, conv)

    assert torch.autograd.gradcheck(fused, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("init", ["milora", "pissa", "random", "middle", "lora"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_equal_the_plain_formula(
    init: str, conv: bool, dtype: torch.dtype, tolerance: float
) -> None:
    layer = adapted(init, dtype, conv)
    x = torch.randn(3, TOKENS, IN, dtype=dtype, requires_grad=True)
    direction = torch.randn(3, TOKENS, OUT, dtype=dtype)
    wanted_from = (x, layer.lora_A, layer.lora_B)
    y = layer(x)
    gradients = torch.autograd.grad((y * direction).sum(), wanted_from)
    reference = plain(copy.deepcopy(layer).double(), x.double())
    twin = copy.deepcopy(layer).double()
    twin_x = x.detach().double().requires_grad_()
    expected = torch.autograd.grad((plain(twin, twin_x) * direction).sum(), (twin_x, twin.lora_A, twin.lora_B))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance)
    for got, want in zip(gradients, expected, strict=True):
        assert (got.double() - want).norm() <= tolerance * want.norm()
    assert gradients[1].dtype == gradients[2].dtype == torch.float32


def test_dropout_draws_one_mask_for_output_and_gradients() -> None:
    layer = adapted(lora_dropout=0.4).train()
    x = torch.randn(TOKENS, IN, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    mask, keep = draw_mask(x, 0.4)
    assert 0 < mask.sum() < mask.numel()
    reference = plain(layer, x, mask, keep)
    torch.testing.assert_close(y, reference)
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B)),
        torch.autograd.grad(reference.square().sum(), (x, layer.lora_A, layer.lora_B)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x), plain(layer, x))


def test_reference_update_has_the_layers_dropout() -> None:
    layer = adapted(lora_dropout=0.4).train()
    x = torch.randn(TOKENS, IN)
    torch.manual_seed(3)
    fused = layer(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fused, layer.base_layer(x) + layer.update(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_start_is_the_base_layer_bit_for_bit(dtype: torch.dtype, conv: bool, p: float) -> None:
    base = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT)
    model = nn.Sequential(base.to(dtype)).train()
    x = torch.randn(3, TOKENS, IN, dtype=dtype)
    before = model(x)
    inject(model, LoRAConfig(r=R, lora_dropout=p))
    torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=0)
    initialize(model)
    torch.testing.assert_close(model.train()(x), before, rtol=0, atol=0)


def test_disabled_layer_is_the_base_layer_bit_for_bit() -> None:
    layer = adapted(dtype=torch.bfloat16)
    x = torch.randn(TOKENS, IN, dtype=torch.bfloat16)
    assert not torch.equal(layer(x), layer.base_layer(x))
    with adapters_disabled(layer):
        assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.enabled


def test_autocast_computes_in_its_dtype_and_leaves_gradients_in_float32() -> None:
    layer = adapted()
    x = torch.randn(TOKENS, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        base = layer.base_layer(x)
    assert y.dtype == base.dtype == torch.bfloat16
    (y.float() ** 2).sum().backward()
    reference = plain(layer, x)
    assert (y - reference).norm() <= 2e-2 * reference.norm()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_dropout_mask(use_reentrant: bool) -> None:
    layer = adapted(lora_dropout=0.4).train()
    x = torch.randn(TOKENS, IN, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        gradients.append((x.grad, layer.lora_A.grad, layer.lora_B.grad))
    for direct, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(direct, checkpointed)


def test_one_layer_used_twice_in_a_forward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN))
    (layer,) = inject(model, LoRAConfig(r=R)).values()
    initialize(model)
    with torch.no_grad():
        layer.lora_A.mul_(1.2)
    x = torch.randn(TOKENS, IN)
    got = torch.autograd.grad(layer(layer(x)).sum(), (layer.lora_A, layer.lora_B))
    want = torch.autograd.grad(plain(layer, plain(layer, x)).sum(), (layer.lora_A, layer.lora_B))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dropout", "dtype"), [(0.0, torch.float32), (0.0, torch.bfloat16), (0.2, torch.float32)])
def test_compiled_layer_computes_the_same(dropout: float, dtype: torch.dtype) -> None:
    """In one graph. The backend is the one that keeps torch's random numbers, so that the masks are the same."""
    layer = adapted(lora_dropout=dropout).to(dtype).train()
    x = torch.randn(TOKENS, IN, requires_grad=True, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if dropout else "inductor")

    def seeded(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(4)
        return run(x)

    for a, b in zip(
        torch.autograd.grad(seeded(compiled).square().sum(), (x, layer.lora_A, layer.lora_B)),
        torch.autograd.grad(seeded(layer).square().sum(), (x, layer.lora_A, layer.lora_B)),
        strict=True,
    ):
        bound = (1e-4, 1e-5) if dtype == torch.float32 else (0.1, 1e-2 * float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=bound[0], atol=bound[1])


def test_half_precision_casts_the_base_and_not_the_factors() -> None:
    layer = adapted()
    factors = {name: p.clone() for name, p in layer.named_parameters() if not name.startswith("base_layer")}
    layer.to(torch.bfloat16)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    for name, before in factors.items():
        assert torch.equal(layer.get_parameter(name), before)
    layer.double()
    assert layer.lora_A.dtype == torch.float64


def test_small_updates_survive_bfloat16() -> None:
    """One optimizer step's update is within 1 % of its float64 value; as a difference of products it would not be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16))
    (layer,) = inject(model, LoRAConfig(r=16)).values()
    initialize(model)
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=3e-4)
    model(x).float().square().mean().backward()
    optimizer.step()
    exact = F.linear(x.double(), copy.deepcopy(layer).double().delta_weight())
    error = (layer.update(x).double() - exact).norm() / exact.norm()
    A, B = layer.lora_A, layer.lora_B
    naive = torch.cat([B, -layer.initial_B], 1).bfloat16(), torch.cat([A, layer.initial_A]).bfloat16()
    naive_error = (F.linear(F.linear(x, naive[1]), naive[0]).double() - exact).norm() / exact.norm()
    assert error < 0.01 < naive_error


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_memory_saved_for_backward_is_the_input_its_projection_and_the_stacked_factors(dropout: float) -> None:
    layer = adapted(lora_dropout=dropout).train()
    x = torch.randn(TOKENS, IN, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in saved if t.data_ptr() not in parameters}
    mask = TOKENS * IN if dropout else 0  # a byte each, on CPUs
    assert sum(storages.values()) == 4 * (TOKENS * (IN + 2 * R) + 2 * R * (IN + OUT)) + mask


def test_weight_is_that_of_the_function_and_trains() -> None:
    for conv in (False, True):
        layer = adapted(conv=conv)
        x = torch.randn(TOKENS, IN)
        weight = layer.weight.T if conv else layer.weight
        torch.testing.assert_close(F.linear(x, weight, layer.bias), layer(x))
        layer.weight.square().sum().backward()
        assert layer.lora_A.grad.abs().sum() > 0
        assert layer.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize("trained", ["initial_A", "initial_B"])
def test_an_initial_factor_that_is_made_trainable_gets_its_gradient(trained: str) -> None:
    layer = adapted()
    x = torch.randn(TOKENS, IN)
    factor = getattr(layer, trained).requires_grad_()
    wanted_from = (factor, layer.lora_A, layer.lora_B)
    got = torch.autograd.grad(layer(x).square().sum(), wanted_from)
    want = torch.autograd.grad(plain(layer, x).square().sum(), wanted_from)
    assert got[0].any()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_base_layers_with_their_own_forward_are_called() -> None:
    """Hooks on the base layer and subclasses with another forward keep working."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Doubled(IN, OUT))
    x = torch.randn(TOKENS, IN)
    before = model(x)
    inject(model, LoRAConfig(r=R))
    initialize(model)
    assert torch.equal(model(x), before)
    hooked = adapted()
    calls: list[int] = []
    hooked.base_layer.register_forward_hook(lambda *_: calls.append(1))
    hooked(x)
    assert calls == [1]


def test_training_before_initialization_is_refused() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    inject(model, LoRAConfig(r=R))
    with pytest.raises(RuntimeError, match="initialize"):
        model(torch.randn(2, IN))


def test_only_linear_layers() -> None:
    with pytest.raises(TypeError, match="Embedding"):
        LoRALinear(nn.Embedding(3, 4), r=1)


def test_layers_are_called_by_keyword_as_those_of_torch() -> None:
    images, ids = torch.randn(2, 3, 8, 8), torch.randint(9, (2, 5))
    model = nn.ModuleDict({"linear": nn.Linear(8, 6), "conv": nn.Conv2d(3, 4, 3), "embed": nn.Embedding(9, 6)})
    inject(model, LoRAConfig(r=2, target_modules=["linear", "conv", "embed"]))
    initialize(model)
    for name, x in (("linear", images), ("conv", images), ("embed", ids)):
        assert torch.equal(model[name](input=x), model[name](x))
