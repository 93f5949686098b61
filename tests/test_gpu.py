"""What only a GPU can show; make gpu runs it. Each test says what it would catch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import save_tiny_model, tiny_model
from helpers.modules import module
from helpers.whole_runs import assert_same, everything, fit, write_base
from lightning.pytorch import Callback
from torch import nn

from milora_lightning import LoRAConfig, adapters_merged, initialize, inject, lora_layers
from milora_lightning.models.compile import compile_layers
from milora_lightning.models.loss import causal_lm_loss, linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}


def moved(layer: nn.Module) -> nn.Module:
    """The same layer on the GPU."""
    return copy.deepcopy(layer).cuda()


def adapted(dtype: torch.dtype, init: str = "milora", bias: bool = True, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160, bias=bias).to(dtype))
    inject(model, LoRAConfig(r=8, init=init, lora_dropout=dropout))
    initialize(model, cache=False)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A.add_(torch.randn_like(layer.lora_A), alpha=0.1)
            layer.lora_B.add_(torch.randn_like(layer.lora_B), alpha=0.1)
    return model.train()


@pytest.mark.parametrize("init", ["milora", "lora"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_a_layer_computes_what_it_does_on_the_cpu(init: str, dtype: torch.dtype, tolerance: float) -> None:
    """Would catch a CUDA path of the layer that adds, scales, casts or saves something else: outputs and gradients."""
    layer = adapted(dtype, init)
    x, grad = torch.randn(4, 33, 96).to(dtype), torch.randn(4, 33, 160).to(dtype)
    found = []
    for each, device in ((layer, "cpu"), (moved(layer), "cuda")):
        inputs = x.to(device).requires_grad_()
        y = each(inputs)
        y.backward(grad.to(device))
        factors = [p.grad.cpu() for p in each.parameters() if p.grad is not None]
        found.append([y.detach().cpu(), inputs.grad.cpu(), *factors])
    assert len(found[0]) == 4
    for here, there in zip(*found, strict=True):
        assert (here.float() - there.float()).norm() <= tolerance * here.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_the_gpu_drops_its_share_and_keeps_the_mean(dtype: torch.dtype) -> None:
    """Would catch a mask that is drawn, scaled or repeated in backward in another way than on the CPU."""
    layer, exact = moved(adapted(dtype, dropout=0.25)), moved(adapted(dtype))
    x = torch.randn(64, 96, device="cuda", dtype=dtype)
    with torch.no_grad():
        base = exact[0].base_layer(x)
        mean = torch.stack([layer(x) - base for _ in range(400)]).float().mean(0)
        update = (exact(x) - base).float()
    assert (mean - update).norm() <= 0.1 * update.norm()
    torch.manual_seed(0)
    inputs = x.clone().requires_grad_()
    y = layer(inputs)
    y.backward(torch.ones_like(y))
    (adapter,) = lora_layers(layer).values()
    direction = 1e-1 * torch.randn_like(adapter.lora_B)
    torch.manual_seed(0)
    before = layer(x).sum(dtype=torch.float64).item()
    with torch.no_grad():
        adapter.lora_B.add_(direction)
        torch.manual_seed(0)
        after = layer(x).sum(dtype=torch.float64).item()
    expected = (adapter.lora_B.grad * direction).sum().item()
    assert after - before == pytest.approx(expected, rel=2e-2 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    """Would catch the large chunks of other devices going wrong, which no test on a CPU computes."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).to(dtype), torch.randn(1000, 64).to(dtype)
    targets = torch.randint(0, 1000, (300,))
    found = []
    for device in ("cpu", "cuda"):
        h = hidden.to(device).requires_grad_()
        total = linear_cross_entropy(h, weight.to(device), None, targets.to(device))
        total.backward()
        found.append((total.detach().cpu(), h.grad.cpu().float()))
    reference = F.cross_entropy(hidden.float() @ weight.float().T, targets, reduction="sum")
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[1][0], reference, rtol=1e-2, atol=0)
    assert (found[1][1] - found[0][1]).norm() <= 2e-2 * found[0][1].norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_run_is_that_of_the_cpu(kind: str, tmp_path: Path) -> None:
    """Training, monitors, resuming, evaluation, answers and export: would catch any device that is mixed on the way."""
    base = write_base(tmp_path, kind)
    assert_same(everything(base, "there", GPU, dropout=0), everything(base, "here", {}, dropout=0), rtol=1e-2)


def test_a_resumed_run_draws_the_same_dropout(tmp_path: Path) -> None:
    """Would catch a generator of the GPU that a checkpoint does not bring back."""
    base = write_base(tmp_path, "llama")
    found = everything(base, "there", GPU)
    for key, value in found["state"].items():
        torch.testing.assert_close(found["resumed"][key], value, rtol=1e-5, atol=1e-6)


def test_no_training_step_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch what the simulated device does not know of as a wait: CUDA itself raises at one."""

    class Strict(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx:
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    # transformers' one wait in each step, for whether positions restart
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None)
    try:
        fit(write_base(tmp_path, "llama"), "strict", [Strict()], GPU, limit_val_batches=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_float16_trains_with_scaling(tmp_path: Path) -> None:
    """Would catch gradients that Lightning's 16-mixed does not scale, or scales twice."""
    base = save_tiny_model(tmp_path / "model", "llama").parent
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    lm = module(base / "model", dtype="float16", learning_rate=1e-2)
    fit(base, "half", [Losses()], GPU, lm=lm, precision="16-mixed", max_steps=8, limit_val_batches=0)
    assert lm.model.dtype == torch.float16
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in lm.parameters() if p.requires_grad)


def test_generation_with_merged_factors_answers_as_without() -> None:
    """Would catch TF32 or a stale sum in what generation computes once instead of at each call."""
    model = tiny_model().cuda().eval()
    inject(model, LoRAConfig(r=4))
    initialize(model, cache=False)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.add_(torch.randn_like(layer.lora_B), alpha=0.02)
    ids = torch.randint(5, 100, (3, 9), device="cuda")
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **asked)
    with adapters_merged(model):
        assert torch.equal(model.generate(ids, **asked), plain)


@pytest.mark.slow
def test_compiled_layers_train_the_same(tmp_path: Path) -> None:
    """Would catch a fused kernel of Inductor for CUDA that computes another gradient than the layers do."""
    model = tiny_model("llama", torch.bfloat16).cuda().train()
    compiled = copy.deepcopy(model)
    ids = torch.randint(5, 100, (4, 24), device="cuda")
    gradients = []
    for each in (model, compiled):
        inject(each, LoRAConfig(r=4))
        initialize(each, cache=False)
        if each is compiled:
            compile_layers(each)
        causal_lm_loss(each, ids, ids).backward()
        gradients.append([p.grad.float() for p in each.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()
