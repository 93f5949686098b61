"""Which activations are computed again in backward; the gradients are the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.models.checkpointing import Recomputation, checkpoint_layers

IDS = torch.arange(20).view(2, 10) + 5


class Attentions(TorchDispatchMode):
    """Counts how often torch's fused attention and products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.attentions += "scaled_dot_product" in name and "backward" not in name
        self.products += name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


def step(how: Recomputation | None) -> tuple[list[torch.Tensor], Attentions]:
    """Return the gradients, and what is computed in backward."""
    model = tiny_model("llama")
    inject(model, LoRAConfig(r=4, init="lora"))
    initialize(model)
    if how is not None:
        checkpoint_layers(model, how)
    loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    with Attentions() as counted:
        loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], counted


@pytest.mark.parametrize(("how", "attentions"), [("full", 2), (2, 1), ("selective", 0)])
def test_gradients_are_the_same_whatever_is_recomputed(how: Recomputation, attentions: int) -> None:
    gradients, plain = step(None)
    again, counted = step(how)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert plain.attentions == 0
    assert counted.attentions == attentions
    assert counted.products > plain.products


@pytest.mark.parametrize("every", [1, 2, 3, 8])
def test_every_nth_layer_is_recomputed(every: int) -> None:
    model = tiny_model("llama", num_hidden_layers=7)
    checkpoint_layers(model, every)
    places = [number for number, layer in enumerate(model.model.layers) if layer.gradient_checkpointing]
    assert len(places) == -(-7 // every)
    assert all(after - before == every for before, after in pairwise(places))
