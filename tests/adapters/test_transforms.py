"""Second derivatives and torch.func's transforms through an adapter: those of the plain formula, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.layers import IN, OUT, adapted, plain
from torch import Tensor, nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from milora_lightning import LoRALinear
from milora_lightning.adapters.linear_layers import is_plain

FEW, MANY = 5, 40  # tokens on either side of where weight and update are summed first


class Plain(nn.Module):
    """The formula of the layer's documentation, of the same factors."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return plain(self.layer, x)


def pair(**options: object) -> tuple[nn.Module, nn.Module]:
    """Two layers with a bend between them, with adapters and by the formula."""
    layer, head = adapted(**options).double(), nn.Linear(OUT, 1).double()
    return nn.Sequential(layer, nn.Tanh(), head), nn.Sequential(Plain(layer), nn.Tanh(), head)


def factors(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]


def alike(one: object, other: object) -> None:
    for a, b in zip(torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other), strict=True):
        assert b.abs().max() > 1e-6  # nothing is proved by zeros
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.fixture(params=[FEW, MANY])
def x(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(request.param, IN, dtype=torch.float64)


@pytest.mark.parametrize("init", ["milora", "lora"])
@pytest.mark.parametrize("conv", [False, True])
def test_gradgradcheck(init: str, conv: bool) -> None:
    layer = adapted(init, conv=conv).double()
    for tokens in (2, MANY):
        x = torch.randn(tokens, IN, dtype=torch.float64, requires_grad=True)

        def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return functional_call(layer, {"lora_A": A, "lora_B": B}, (x,)).square()

        inputs = x, layer.lora_A, layer.lora_B
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_gradient_penalties(x: Tensor) -> None:
    results = []
    for model in pair():
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        (g,) = torch.autograd.grad(y.sum(), inputs, create_graph=True)
        penalty = (g.norm(dim=-1) - 1).square().sum()
        results.append(torch.autograd.grad(penalty + y.square().sum(), [inputs, *factors(model)]))
    alike(*results)


def test_a_constant_gradient_of_the_output_hides_nothing(x: Tensor) -> None:
    """The gradient of the input of a single layer depends on the factors, however constant the output's is."""
    layer = adapted().double()
    results = []
    for call in (layer, Plain(layer)):
        inputs = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(call(inputs).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), [layer.lora_A, layer.lora_B]))
    alike(*results)


def test_dropout_keeps_its_mask_in_second_derivatives(x: Tensor) -> None:
    layer = adapted(lora_dropout=0.4).double().train()
    results = []
    for call in (layer, lambda x: layer.base_layer(x) + layer.update(x)):
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(call(inputs).square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), [layer.lora_A, layer.lora_B]))
    alike(*results)


@pytest.mark.parametrize("name", ["hvp", "vhp", "jvp", "vjp", "jacobian", "hessian"])
def test_autograd_functional(name: str, x: Tensor) -> None:
    function = getattr(functional, name)
    direction = (torch.randn_like(x),) if name in ("hvp", "vhp", "jvp") else ()
    alike(*(function(lambda x, m=model: m(x).square().sum(), x, *direction) for model in pair()))


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobians(strategy: str, x: Tensor) -> None:
    options = {"vectorize": True, "strategy": strategy}
    alike(*(functional.jacobian(lambda x, m=model: m(x).sum(0), x, **options) for model in pair()))


def losses() -> list[tuple[Callable[[dict[str, Tensor], Tensor], Tensor], dict[str, Tensor]]]:
    """Functions of the factors, keyed alike, and of x."""
    cases = []
    for model in pair():
        parameters = dict(model.named_parameters())
        names = {name.rpartition(".")[2]: name for name in parameters if name.endswith(("lora_A", "lora_B"))}

        def loss(values: dict[str, Tensor], x: Tensor, m: nn.Module = model, names: dict = names) -> Tensor:
            return functional_call(m, {names[key]: value for key, value in values.items()}, (x,)).square().sum()

        cases.append((loss, {key: parameters[name].detach() for key, name in names.items()}))
    return cases


TRANSFORMS: dict[str, Callable[..., object]] = {
    "grad": lambda f, p, x: grad(f, argnums=(0, 1))(p, x),
    "per-sample gradients": lambda f, p, x: vmap(grad(f), (None, 0))(p, x),
    "per-sample gradients in parts": lambda f, p, x: vmap(grad(f), (None, 0), chunk_size=3)(p, x),
    "an ensemble": lambda f, p, x: vmap(f, (0, None))({k: torch.stack([v, 2 * v]) for k, v in p.items()}, x),
    "jvp": lambda f, p, x: jvp(f, (p, x), ({k: v + 1 for k, v in p.items()}, x.cos()))[1],
    "jacrev": lambda f, p, x: jacrev(f, argnums=(0, 1))(p, x),
    "jacfwd": lambda f, p, x: jacfwd(f, argnums=1)(p, x),
    "hessian": lambda f, p, x: hessian(f)(p, x),
    "grad of grad": lambda f, p, x: grad(lambda p, x: grad(f, argnums=1)(p, x).square().sum())(p, x),
}


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transforms(name: str, x: Tensor) -> None:
    alike(*(TRANSFORMS[name](loss, parameters, x) for loss, parameters in losses()))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.10 cannot view as another dtype in vmap, 2.13 can")
def test_per_sample_gradients_with_dropout_draw_for_each_sample() -> None:
    layer = adapted(lora_dropout=0.5).double().train()
    x = torch.ones(64, IN, dtype=torch.float64)

    def loss(A: Tensor, x: Tensor) -> Tensor:
        return functional_call(layer, {"lora_A": A}, (x,)).sum()

    rows = vmap(grad(loss), (None, 0), randomness="different")(layer.lora_A.detach(), x)
    dropped = (rows == 0).all(1)  # a feature that is dropped gives its column of A no gradient
    assert 0.4 < dropped.double().mean() < 0.6
    assert len(dropped.unique(dim=0)) > 60
    same = vmap(grad(loss), (None, 0), randomness="same")(layer.lora_A.detach(), x)
    assert torch.equal(same, same[:1].expand_as(same))


def test_forward_mode(x: Tensor) -> None:
    results = []
    for model in pair():
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent)
    alike(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant: bool, x: Tensor) -> None:
    results = []
    for model in pair():
        inputs = x.clone().requires_grad_()
        y = checkpoint(model, inputs, use_reentrant=use_reentrant)
        results.append(torch.autograd.grad(y.square().sum(), [inputs, *factors(model)])) if not use_reentrant else None
        if use_reentrant:  # which knows backward() only
            model.zero_grad()
            y.square().sum().backward()
            results.append([inputs.grad, *(p.grad.clone() for p in factors(model))])
    alike(*results)


def test_second_derivatives_through_a_checkpoint(x: Tensor) -> None:
    results = []
    for model in pair():
        inputs = x.clone().requires_grad_()
        y = checkpoint(model, inputs, use_reentrant=False)
        (g,) = torch.autograd.grad(y.sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), [inputs, *factors(model)]))
    alike(*results)


def test_what_was_frozen_gets_its_gradient_when_it_is_asked_for(x: Tensor) -> None:
    """As with a bias that a user trains beside the adapters, or gradients of all parameters."""
    model, formula = pair()
    results = []
    for m in (model, formula):
        base = m[0].base_layer if m is model else m[0].layer.base_layer
        base.requires_grad_(True)
        results.append(torch.autograd.grad(m(x).square().sum(), [base.weight, base.bias, *factors(m)]))
    alike(*results)


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_forward_pre_hook"]
)
def test_hooks_of_the_base_layer_are_called(register: str) -> None:
    layer = adapted()
    calls: list[int] = []
    getattr(layer.base_layer, register)(lambda *_: calls.append(1))
    layer(torch.randn(3, IN, requires_grad=True)).sum().backward()
    assert calls == [1]


def test_hooks_of_all_modules_see_the_base_layer() -> None:
    layer = adapted()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(3, IN))
    finally:
        handle.remove()
    assert layer.base_layer in seen
    seen.clear()
    layer(torch.randn(3, IN))
    assert not seen


def test_first_derivatives_stay_one_operation() -> None:
    """Second ones are made for when they are asked for alone: nothing more is done or saved otherwise."""
    layer = copy.deepcopy(adapted())
    assert is_plain(layer.base_layer.weight)
    for tokens in (FEW, MANY):
        x = torch.randn(tokens, IN, requires_grad=True)
        y = layer(x)
        assert "LoRA" in y.grad_fn.name()
        (g,) = torch.autograd.grad(y.sum(), x)
        assert g.grad_fn is None
