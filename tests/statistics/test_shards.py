"""Starts from data of weights in shards: a pass over data must leave factors where training finds them."""

from __future__ import annotations

import pytest
import torch
from helpers.models import tiny_model
from helpers.starting import token_batches
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from milora_lightning import LoRAConfig, collect_statistics, initialize, inject, lora_layers
from milora_lightning.models.sharding import shard
from milora_lightning.parallel.dtensor import full_tensor
from milora_lightning.parallel.gathering import free_gathered


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("init", ["corda", "lora_one"])
def test_factors_go_to_shards_whatever_a_forward_pass_has_left_gathered(init: str) -> None:
    """FSDP2 keeps the last layer and what is in none until the backward; what is written to copies would be lost."""
    model = tiny_model("llama")
    inject(model, LoRAConfig(r=2, init=init))
    shard(model, init_device_mesh("cpu", (1,)))
    statistics = collect_statistics(model, token_batches(2))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with torch.no_grad():
        model(**token_batches(1)[0])
    initialize(model, statistics=statistics, cache=False)
    free_gathered(model)
    for layer in lora_layers(model).values():
        assert full_tensor(layer.lora_A).any()
        assert torch.equal(full_tensor(layer.lora_B), full_tensor(layer.initial_B))
