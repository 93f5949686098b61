"""The chunked loss against the plain one, for every kind of head."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import TINY_CONFIGS, tiny_model
from helpers.small_models import small_config
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, LlamaForCausalLM, PretrainedConfig, XLMConfig

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.models import loss
from milora_lightning.models.attention import NAME
from milora_lightning.models.loss import (
    causal_lm_loss,
    example_weights,
    linear_cross_entropy,
    row_losses,
    supervised_logits,
)


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
    monkeypatch.setattr(loss, "CPU_LOGITS", 128 * rows)
    monkeypatch.setattr(loss, "CPU_PROBABILITIES", 128 * part)
    model = tiny_model(kind).eval()  # some architectures have dropout of their own
    adapters = inject(model, LoRAConfig(r=4))
    initialize(model)
    trained = [p for layer in adapters.values() for p in (layer.lora_A, layer.lora_B)]
    got, want = causal_lm_loss(model, *batch()), reference(model, *batch())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got * 0.1, trained), torch.autograd.grad(want * 0.1, trained), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # chunk by chunk, and from the model's own logits
def test_losses_of_rows_are_those_of_each_row_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CPU_LOGITS", 128 * 5)
    monkeypatch.setattr(loss, "CPU_PROBABILITIES", 128 * 2)
    model = tiny_model(kind).eval().requires_grad_(False)
    input_ids, labels = batch()
    labels[0, 0] = input_ids[0, 0]  # which nothing predicts
    labels[2] = -100  # a row that only pads the batch
    losses, counts = row_losses(model, input_ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert row_losses(model, input_ids, labels)[0].dtype == torch.float32
    assert counts.tolist() == [8, 5, 0]
    for row in range(3):
        alone = reference(model, input_ids[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(losses[row], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.sum(), causal_lm_loss(model, input_ids, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # chunk by chunk, and from the model's own logits
@pytest.mark.parametrize("packed", [False, True])
def test_weighted_loss_and_gradients_are_those_of_the_examples_means(
    kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CPU_LOGITS", 128 * 5)
    monkeypatch.setattr(loss, "CPU_PROBABILITIES", 128 * 2)
    model = tiny_model(kind).eval()
    adapters = inject(model, LoRAConfig(r=4))
    initialize(model)
    trained = [p for layer in adapters.values() for p in (layer.lora_A, layer.lora_B)]
    input_ids, labels = batch()
    labels[1] = -100  # an example without labels does not count
    labels[0, 0], labels[0, 7:] = 5, -100  # a first label is never predicted; the others are fewer than those of row 2
    rows = [(i, j) for i, j in zip(input_ids, labels, strict=True)]
    means = [reference(model, i[None], j[None]) / (j[1:] != -100).sum() for i, j in rows if (j != -100).any()]
    positions = None
    if packed:
        positions = torch.arange(12).repeat(3)[None]
        input_ids, labels = input_ids.view(1, -1), labels.view(1, -1).clone()
        labels[:, ::12] = -100
    weights, number = example_weights(labels, positions)
    assert number == len(means) == 2
    got, want = causal_lm_loss(model, input_ids, labels, positions, weights), sum(means)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got * 0.1, trained), torch.autograd.grad(want * 0.1, trained), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    assert (causal_lm_loss(model, input_ids, labels, positions) / 2 - want).abs() > 0.1  # another loss


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


def calls_of(module: torch.nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


class Changed(LlamaForCausalLM):
    """What a model from the Hub may bring: it does something to its logits that no configuration names."""

    def __init__(self, config: PretrainedConfig, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(config)
        self.change = change

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = self.change(output.logits)
        return output


def halve_rows(logits: Tensor) -> Tensor:
    for row in range(logits.shape[1]):
        logits[:, row : row + 1] = logits[:, row : row + 1] / 2
    return logits


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "out of place": lambda logits: 3 * logits,
    "in place": lambda logits: logits.mul_(3),
    "row by row": halve_rows,
    "after a conversion": lambda logits: logits.double().tanh_(),
    "in place after a conversion": lambda logits: logits.to(torch.float64).mul_(3),
    "into less precision": lambda logits: logits.bfloat16(),
    "along the sequence": lambda logits: logits.cumsum(1),
}


@pytest.mark.filterwarnings("ignore:What Changed does to its logits")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_unknown_changes_of_the_logits_are_noticed(change: str, context: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = Changed(TINY_CONFIGS["llama"], CHANGES[change])
    model.lm_head.requires_grad_(False)
    with context():
        want = reference(model, *batch())
        torch.testing.assert_close(causal_lm_loss(model, *batch()), want, check_dtype=False)
        logits = supervised_logits(model, *batch())
    labels = batch()[1][:, 1:]
    torch.testing.assert_close(F.cross_entropy(logits.float(), labels[labels != -100], reduction="sum"), want)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [lambda logits: logits, lambda logits: logits.float()])
def test_models_that_only_convert_their_logits_run_once(
    change: Callable[[Tensor], Tensor], context: Callable[[], Any]
) -> None:
    """Negative control: what is noticed is no more than what matters."""
    torch.manual_seed(0)
    model = Changed(TINY_CONFIGS["llama"], change).bfloat16()
    model.lm_head.requires_grad_(False)
    calls = calls_of(model.model)
    with context():
        total = causal_lm_loss(model, *batch())
    assert len(calls) == 1
    torch.testing.assert_close(total, reference(model, *batch()), rtol=1e-4, atol=0)


def test_what_is_noticed_is_said_once() -> None:
    class Unheard(Changed):
        pass

    model = Unheard(TINY_CONFIGS["llama"], lambda logits: 3 * logits)
    model.lm_head.requires_grad_(False)
    with pytest.warns(UserWarning, match="Unheard changes its logits in a way that is not known here"):
        causal_lm_loss(model, *batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        causal_lm_loss(model, *batch())


@pytest.mark.parametrize("name", ["is_decoder", "causal"])
def test_models_that_see_what_they_predict_are_refused(name: str) -> None:
    config = {"is_decoder": BertConfig, "causal": XLMConfig}[name]
    model = AutoModelForCausalLM.from_config(small_config(config, **{name: False}))
    with pytest.raises(ValueError, match=f"{name}=False in its configuration attends to the tokens that it should"):
        causal_lm_loss(model, *batch())


def test_another_attention_gives_the_same_loss() -> None:
    """On a model that was used with one before: nothing of it is remembered."""
    torch.manual_seed(0)
    config = copy.deepcopy(TINY_CONFIGS["llama"])
    config.num_hidden_layers = 4
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).requires_grad_(False)
    losses = [causal_lm_loss(model, *batch())]
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        losses += [causal_lm_loss(model, *batch()), reference(model, *batch())]
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(5))


def test_tuples_are_read() -> None:
    model = tiny_model().requires_grad_(False)
    losses, logits = causal_lm_loss(model, *batch()), supervised_logits(model, *batch())
    plain = model.forward
    model.forward = lambda **inputs: plain(**inputs).to_tuple()
    assert torch.equal(causal_lm_loss(model, *batch()), losses)
    assert torch.equal(supervised_logits(model, *batch()), logits)


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


def test_second_derivatives_equal_the_plain_losss() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.randn(11)
    targets, direction = torch.tensor([0, 3, 10, 3, 7]), torch.randn(5, 8)
    products = []
    for function in (linear_cross_entropy, _plain):
        (first,) = torch.autograd.grad(function(hidden, weight, bias, targets), hidden, create_graph=True)
        products.append(torch.autograd.grad((first * direction).sum(), hidden)[0])
    torch.testing.assert_close(*products)
    assert products[0].abs().sum() > 1


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


class Doubled(torch.nn.Linear):
    """A frozen head whose logits are other than the product with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("head", [torch.nn.Linear, Doubled])
@pytest.mark.parametrize("trained", [False, True])
def test_heads_of_any_kind_give_the_loss_of_their_own_logits(head: type[torch.nn.Linear], trained: bool) -> None:
    model = tiny_model().requires_grad_(False)
    torch.manual_seed(1)
    model.lm_head = head(32, 128, bias=False).requires_grad_(trained)
    ids = torch.randint(0, 128, (2, 9))
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    found = causal_lm_loss(model, ids, ids)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad == trained
