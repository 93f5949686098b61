"""Dropout on the product, as in PEFT's layer, beside dropout on the update."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import embedded_model
from torch import Tensor, nn

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.adapters.dropout import draw_mask
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.models.pretrained import load_tokenizer

P = 0.25


def layer(dropout_on: Any, init: Any = "pissa") -> LoRALinear:
    """A layer whose factors have left their start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    config = LoRAConfig(r=4, lora_alpha=8, lora_dropout=P, init=init, dropout_on=dropout_on)
    (adapted,) = inject(model, config).values()
    initialize(model, seed=0)
    adapted.lora_A.data += 0.1 * torch.randn_like(adapted.lora_A)
    adapted.lora_B.data += 0.1 * torch.randn_like(adapted.lora_B)
    return adapted


@pytest.mark.parametrize("dropout_on", ["update", "product"])
def test_output_and_gradients_are_the_formulas(dropout_on: str) -> None:
    """W x + s (B A − B₀A₀) drop(x), or W' x + s B A drop(x) with W' = W − s B₀A₀."""
    adapted = layer(dropout_on).train()
    x = torch.randn(5, 24, requires_grad=True)
    torch.manual_seed(1)
    mask, keep = draw_mask(x, P)
    dropped = x * mask / keep
    W, b, s = adapted.base_layer.weight, adapted.base_layer.bias, adapted.scaling
    A, B, A0, B0 = adapted.factors
    assert A0 is not None
    assert B0 is not None
    if dropout_on == "product":
        want = F.linear(x, W - s * B0 @ A0, b) + F.linear(dropped, s * B @ A)
    else:
        want = F.linear(x, W, b) + F.linear(dropped, s * (B @ A - B0 @ A0))
    torch.manual_seed(1)
    got = adapted(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    upstream, trained = torch.randn_like(got), (x, adapted.lora_A, adapted.lora_B)
    gradients = (torch.autograd.grad(y, trained, upstream) for y in (got, want))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_dropout_and_from_loras_start_both_are_one() -> None:
    x = torch.randn(3, 24)
    update, product = layer("update"), layer("product")
    assert torch.equal(update.eval()(x), product.eval()(x))
    outputs = []
    for adapted in (layer("update", "lora"), layer("product", "lora")):
        torch.manual_seed(1)
        outputs.append(adapted.train()(x))
    torch.testing.assert_close(*outputs)


def test_another_place_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout_on must be update or product, not 'input'"):
        LoRAConfig(dropout_on="input")  # type: ignore[arg-type]


@torch.no_grad()
def start(init: str, ids: Tensor) -> dict[str, float]:
    """KL divergence from the pretrained model in the first forward of training, r = 32, in nats per token.

    The median of three draws: one that drops the first token's largest activation is 10 nats away. Where nothing is
    dropped at the start, a single draw.
    """
    model = embedded_model("float32").eval()
    base = model(input_ids=ids).logits.log_softmax(-1)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    options: dict[str, Any] = {"init": init, "target_modules": targets}
    adapters = inject(model, LoRAConfig(r=32, lora_dropout=0.05, **options))
    initialize(model)
    found = {}
    for dropout_on in ("product", "update"):
        for adapter in adapters.values():
            adapter.dropout_on = dropout_on
        draws = []
        for seed in range(3 if dropout_on == "product" else 1):
            torch.manual_seed(seed)
            now = model.train()(input_ids=ids).logits.log_softmax(-1)
            draws.append((base.exp() * (base - now)).sum(-1).mean())
        found[dropout_on] = torch.stack(draws).median().item()
    return found


@pytest.mark.slow
def test_start_is_as_far_from_the_pretrained_model_as_documented() -> None:
    """docs/reproduce.md: 0.31 nats for the principal slice, 0.06 for the minor one, and nothing with the default."""
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    ids = torch.tensor([load_tokenizer("embedded")(text[:2000])["input_ids"][:128]])
    principal, minor = start("pissa", ids), start("milora", ids)
    assert 0.15 < principal["product"] < 0.6
    assert 0.02 < minor["product"] < min(0.25, principal["product"])
    assert max(abs(principal["update"]), abs(minor["update"])) < 1e-6
