"""Dropout's masks: their statistics, and where they come from."""

from __future__ import annotations

import pytest
import torch

from milora_lightning.adapters.autograd import draw_mask, masked


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

    def drop(x: torch.Tensor) -> torch.Tensor:
        return masked(x, draw_mask(x, 0.3)[0])

    found = []
    for run in (drop, torch.compile(drop, fullgraph=True, backend="aot_eager")):
        x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        torch.manual_seed(1)
        y = run(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        found.append((y, gradient))
    (eager, wanted), (compiled, gradient) = found
    assert torch.equal(compiled, eager)
    assert torch.equal(gradient, wanted)
    assert torch.equal(gradient, (eager != 0).to(dtype))
