"""The chunked loss against the plain one, for every kind of head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIGS, tiny_model
from torch import Tensor

from milora_lightning import LoRAConfig, initialize, inject, loss
from milora_lightning.loss import causal_lm_loss, linear_cross_entropy


def reference(model: torch.nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=input_ids).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(5, 120, (3, 12))
    labels = input_ids.clone()
    labels[:, :4] = labels[1, 9:] = -100
    return input_ids, labels


@pytest.mark.parametrize("kind", list(TINY_CONFIGS))
@pytest.mark.parametrize(("rows", "part"), [(1, 1), (5, 2), (5, 1000), (1000, 3), (1000, 1000)])
def test_loss_and_gradients_equal_those_of_whole_logits(
    kind: str, rows: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_CPU_LOGITS", 128 * rows)
    monkeypatch.setattr(loss, "_CPU_PROBABILITIES", 128 * part)
    model = tiny_model(kind).eval()  # some architectures have dropout of their own
    adapters = inject(model, LoRAConfig(r=4))
    initialize(model)
    trained = [p for layer in adapters.values() for p in (layer.lora_A, layer.lora_B)]
    got, want = causal_lm_loss(model, *batch()), reference(model, *batch())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got * 0.1, trained), torch.autograd.grad(want * 0.1, trained), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_models_that_change_their_logits_keep_their_own() -> None:
    """Gemma 2 caps its logits softly: the head's bare output would be another loss."""
    model = tiny_model("gemma2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(200)  # so that the cap matters
    hidden = model.model(batch()[0]).last_hidden_state[:, :-1]
    labels = batch()[1][:, 1:]
    bare = linear_cross_entropy(hidden[labels != -100], model.lm_head.weight, None, labels[labels != -100])
    torch.testing.assert_close(causal_lm_loss(model, *batch()), reference(model, *batch()))
    assert (bare - reference(model, *batch())).abs() > 1


def test_trained_heads_get_their_gradient() -> None:
    model = tiny_model()
    inject(model, LoRAConfig(r=4, target_modules=["q_proj", "lm_head"]))
    initialize(model)
    causal_lm_loss(model, *batch()).backward()
    assert model.lm_head.lora_B.grad.abs().sum() > 0


def test_batches_without_labels_are_zero_and_connected() -> None:
    model = tiny_model()
    inject(model, LoRAConfig(r=4))
    initialize(model)
    input_ids, labels = batch()
    total = causal_lm_loss(model, input_ids, torch.full_like(labels, -100))
    total.backward()
    assert total == 0


def test_confident_mistakes_have_a_finite_loss() -> None:
    """The right token's probability underflows in float32."""
    hidden, weight = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    total = linear_cross_entropy(hidden, weight, None, torch.tensor([1]))
    total.backward()
    assert total == 400
    assert hidden.grad == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_whole_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16), torch.randn(300, 16)
    bias, targets = torch.randn(300), torch.randint(0, 300, (50,))
    gradients = []
    for function, kind in ((linear_cross_entropy, dtype), (_plain, dtype), (_plain, torch.float64)):
        h = hidden.to(kind).requires_grad_()
        function(h, weight.to(kind), bias.to(kind), targets).backward()
        gradients.append(h.grad.double())
    ours, plain, exact = gradients
    assert (ours - exact).norm() <= 1.1 * (plain - exact).norm()


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.float() if logits.dtype.itemsize == 2 else logits, targets, reduction="sum")


def test_autocast_computes_the_head_in_its_dtype() -> None:
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(40, 16)
    targets = torch.randint(0, 40, (7,))
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(hidden, weight, None, targets)
    expected = F.cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).float(), targets, reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected)
    total.backward()
    assert hidden.grad.dtype == torch.float32
