"""A learning rate of its own for B, in groups of an optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.training.lora_plus import make_optimizer, set_rates


def test_every_weight_that_trains_is_in_one_group_and_b_has_its_own_rate() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    layers = inject(model, LoRAConfig(r=2, modules_to_save=("1",), target_modules=["0"]))
    initialize(model)
    optimizer = make_optimizer(lambda params: SGD(params, lr=0.1), model, 4.0)
    others, factors = (group["params"] for group in optimizer.param_groups)
    assert {id(p) for p in factors} == {id(layer.lora_B) for layer in layers.values()}
    assert {id(p) for p in others + factors} == {id(p) for p in model.parameters() if p.requires_grad}
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]
    set_rates(optimizer, 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 4.0]
    assert len(make_optimizer(lambda params: SGD(params, lr=0.1), model, 1).param_groups) == 1
    for ratio in (0.0, -1.0):
        with pytest.raises(ValueError, match="must be positive"):
            make_optimizer(lambda params: SGD(params, lr=torch.tensor(0.1)), model, ratio)
