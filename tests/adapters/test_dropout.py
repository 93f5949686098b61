"""Dropout's masks: their statistics, where they come from, and that backward finds them again."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import IN, OUT, TOKENS, adapted, plain

from milora_lightning.adapters import dropout
from milora_lightning.adapters.autograd import lora_linear
from milora_lightning.adapters.dropout import draw_mask, drop, drop_again, random_state, scales


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mask_drops_each_entry_with_its_probability_and_independently(p: float) -> None:
    torch.manual_seed(0)
    mask, keep = draw_mask(torch.empty(999, 1001), p)
    dropped = 1 - mask.double()
    assert keep == pytest.approx(1 - p, abs=1e-5)
    assert dropped.mean() == pytest.approx(p, abs=0.002)
    for shift in (1, 2, 3, 4, 1001):  # neighbours come out of the same 64 bits
        flat = dropped.flatten()
        assert (flat[shift:] * flat[:-shift]).mean() == pytest.approx(p * p, abs=0.003)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 7)])
def test_masks_come_from_torchs_generator_alone(shape: tuple[int, ...]) -> None:
    """So that whoever restores its state (a resumed run, recomputed activations) draws them again."""
    state = torch.get_rng_state()
    first, second = (draw_mask(torch.empty(shape), 0.5)[0] for _ in range(2))
    torch.set_rng_state(state)
    again = [draw_mask(torch.empty(shape), 0.5)[0] for _ in range(2)]
    assert first.shape == shape
    assert torch.equal(torch.stack([first, second]), torch.stack(again))
    assert first.numel() < 15 or not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype: torch.dtype) -> None:
    """The same masks from the same seed, and gradients that are zero where they drop."""

    def dropped(x: torch.Tensor) -> torch.Tensor:
        return drop(x, 0.3)[0]

    found = []
    for run in (dropped, torch.compile(dropped, fullgraph=True, backend="aot_eager")):
        x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        torch.manual_seed(1)
        y = run(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        found.append((y, gradient))
    (eager, wanted), (compiled, gradient) = found
    assert torch.equal(compiled, eager)
    assert torch.equal(gradient, wanted)
    assert torch.equal(gradient, (eager != 0).to(dtype))


@pytest.fixture(params=["integers, kept", "integers, redrawn", "one operation, kept", "one operation, redrawn"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways to draw and to keep; that of GPUs is one operation, which torch has for CPUs, too."""
    monkeypatch.setattr(dropout, "_draws_integers", lambda device: "integers" in request.param)
    monkeypatch.setattr(dropout, "_keeps_masks", lambda device: "kept" in request.param)


@pytest.mark.usefixtures("kernel")
def test_backward_drops_what_forward_has_dropped() -> None:
    layer = adapted(lora_dropout=0.4).train()
    x = torch.randn(3, TOKENS, IN, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    mask = drop(x.detach().view(-1, IN), 0.4)[1].view_as(x)
    assert 0 < mask.sum() < mask.numel()
    torch.randn(7)
    state = torch.get_rng_state()
    got = torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B))
    assert torch.equal(torch.get_rng_state(), state)  # others draw what they would have drawn
    reference = plain(layer, x, mask, 1 / scales(x.device, 0.4)[0])
    torch.testing.assert_close(y, reference)
    want = torch.autograd.grad(reference.square().sum(), (x, layer.lora_A, layer.lora_B))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernel")
def test_a_mask_that_is_given_takes_the_place_of_a_draw() -> None:
    """As ranks that share a layer draw one for its whole input, and take their part of it."""
    layer = adapted()
    x = torch.randn(3, TOKENS, IN, requires_grad=True)
    mask, _ = draw_mask(x, 0.4)
    base = layer.base_layer
    y = lora_linear(x, base.weight, base.bias, *layer.factors, layer.scaling, 0.4, mask=mask)
    reference = plain(layer, x, mask, 1 / scales(x.device, 0.4)[0])
    torch.testing.assert_close(y, reference)
    inputs = x, layer.lora_A, layer.lora_B
    got, want = (torch.autograd.grad(one.square().sum(), inputs) for one in (y, reference))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernel")
def test_backward_can_be_repeated_and_batched() -> None:
    """Under vmap too, which would not let it draw."""
    layer = adapted(lora_dropout=0.4).train()
    x = torch.randn(3, IN, requires_grad=True)
    inputs = x, layer.lora_A, layer.lora_B
    y = layer(x).square().sum(0)
    one_by_one = [torch.autograd.grad(y[i], inputs, retain_graph=True) for i in range(OUT)]
    again = [torch.autograd.grad(y[i], inputs, retain_graph=True) for i in range(OUT)]
    batched = torch.autograd.grad(y, inputs, torch.eye(OUT), retain_graph=True, is_grads_batched=True)
    vmapped = torch.func.vmap(lambda g: torch.autograd.grad(y, inputs, g, retain_graph=True))(torch.eye(OUT))
    for first, second, *others in zip(
        zip(*one_by_one, strict=True), zip(*again, strict=True), batched, vmapped, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for rows in others:
            torch.testing.assert_close(rows, torch.stack(first))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("offload", [False, True])
def test_gradients_do_not_depend_on_where_the_input_lies(offload: bool) -> None:
    """The mask is drawn again for an input that hooks may have moved."""
    results = []
    for lay_out in (lambda x: x, lambda x: x.T.contiguous().T, lambda x: torch.cat([x[:1], x])[1:]):
        layer = adapted(lora_dropout=0.4).train()
        torch.manual_seed(1)
        x = lay_out(torch.randn(TOKENS, IN)).detach().requires_grad_()
        torch.manual_seed(2)
        with (
            torch.autograd.graph.save_on_cpu()
            if offload
            else torch.autograd.graph.saved_tensors_hooks(*[lambda t: t] * 2)
        ):
            y = layer(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B))])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_draw_is_repeated_from_the_state_before_it() -> None:
    x = torch.randn(5, 7)
    state = torch.get_rng_state()
    dropped, mask = drop(x, 0.5)
    drop(x, 0.5)
    again, same = drop_again(x, 0.5, None, state)
    assert torch.equal(again, dropped)
    assert torch.equal(same, mask)
    assert torch.equal(drop_again(x, 0.5, mask, None)[0], dropped)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("features", [IN, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_gpus_repeats_its_draw_wherever_the_input_lies(features: int, dtype: torch.dtype) -> None:
    """It would show that torch's kernel draws by memory layout in a way that is not foreseen here."""
    x = torch.randn(4099, features, device="cuda", dtype=dtype)
    layouts = x, torch.cat([x[:1], x])[1:], x.T.contiguous().T
    state = random_state(x.device)
    dropped, mask = drop(layouts[1], 0.3)
    assert (mask.double().mean() - 0.7).abs() < 0.02
    for layout in layouts:
        again, same = drop_again(layout, 0.3, None, state)
        assert torch.equal(same, mask)
        assert torch.equal(again, dropped)
