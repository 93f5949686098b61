"""Derivatives of the loss under autocast, and what reaches models beside their inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from milora_lightning.models import segments
from milora_lightning.models.loss import linear_cross_entropy
from milora_lightning.models.segments import Segments, attention_arguments
from milora_lightning.models.supervision import _OutputTracker


def test_second_derivatives_under_autocast_are_those_of_its_logits() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(40, 16)
    targets, direction = torch.randint(0, 40, (7,)), torch.randn(7, 16)

    def plain(*_: Any) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    products = []
    for loss in (linear_cross_entropy, plain):
        with torch.autocast("cpu", torch.bfloat16):
            total = loss(hidden, weight, None, targets)
        (first,) = torch.autograd.grad(total, hidden, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), hidden)
        products.append(second)
    assert products[1].norm() > 1
    torch.testing.assert_close(products[0], products[1], rtol=0.05, atol=0.05 * float(products[1].abs().max()))


class WithoutOthers(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_borders_of_examples_are_given_to_flash_attention_of_models_that_pass_them_on(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "attention_of", lambda _: attention)
    ids, starts = torch.tensor([[0, 1, 0]]), torch.tensor([0, 2, 3], dtype=torch.int32)
    positions = Segments(ids, starts, 2)
    other: Any = WithoutOthers()
    assert attention_arguments(other, positions).keys() == {"position_ids"}
    given = attention_arguments(tiny_model("llama"), positions)
    assert ("cu_seq_lens_q" in given) == (attention != "sdpa")
    assert given["position_ids"] is ids


def test_what_a_model_computes_while_its_logits_are_followed_is_the_same() -> None:
    x = torch.randn(3, 4)
    with _OutputTracker():
        found = torch.sum(x, dim=1, keepdim=True)
    assert torch.equal(found, x.sum(1, keepdim=True))
