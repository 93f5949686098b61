"""What a checkpoint says of its base and of its adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.forked import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from milora_lightning import CheckpointError, LoRAConfig, inject
from milora_lightning.checkpoint.adapter import KEY, AdapterCheckpoint
from milora_lightning.checkpoint.fingerprint import fingerprint


def frozen() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(1, 4)).requires_grad_(False)


def on_two_ranks() -> None:
    dist.init_process_group("gloo")
    model = fully_shard(frozen(), mesh=init_device_mesh("cpu", (2,)))
    assert fingerprint(model) == fingerprint(frozen())


def test_shards_have_the_fingerprint_of_the_whole(tmp_path: Path) -> None:
    assert len(set(fingerprint(frozen()).values())) == 6
    statuses = run_ranks(on_two_ranks, tmp_path, limit=120)
    assert statuses == [0, 0], [(tmp_path / f"output{rank}.txt").read_text()[-2000:] for rank in range(2)]


def test_what_trains_in_full_is_looked_for_in_the_part_that_is_adapted() -> None:
    """A new head elsewhere, which trains or not as its owner wishes, is none of the adapters'."""
    torch.manual_seed(0)
    parts = {
        name: nn.ModuleDict({"proj": nn.Linear(8, 8), name: nn.ModuleDict({"classifier": nn.Linear(8, 3)})})
        for name in ("student", "teacher")
    }
    model = nn.ModuleDict(parts)
    config = LoRAConfig(module="student", target_modules=["proj"], modules_to_save="auto", init="lora")
    inject(model, config)
    AdapterCheckpoint.attach(model, config)
    assert model.state_dict()[KEY]["config"]["modules_to_save"] == ("student.classifier",)


def test_the_configuration_that_was_used_last_is_described() -> None:
    """Which may name the same layers, with the same settings, in another way."""
    model = nn.Sequential(nn.Linear(8, 8))
    for config in (LoRAConfig(r=2), LoRAConfig(r=4, target_modules=["0"], rank_pattern={"0": 2})):
        inject(model, config)
        attached = AdapterCheckpoint.attach(model, config)
        assert AdapterCheckpoint.of(model) is attached
        described = model.state_dict()[KEY]["config"]
        assert (described["r"], described["rank_pattern"]) == (config.r, config.rank_pattern)


def test_a_whole_state_dict_without_a_description_is_loaded_and_a_part_of_one_refused() -> None:
    """As a module's own save of all its weights has it."""
    model = nn.ModuleDict({"proj": nn.Linear(8, 8)})
    config = LoRAConfig(r=2, target_modules=["proj"], init="lora")
    inject(model, config)
    whole = {
        name: torch.full_like(value, 0.5) for name, value in model.state_dict().items() if value.is_floating_point()
    }
    AdapterCheckpoint.attach(model, config)
    model.load_state_dict(dict(whole), strict=False)
    assert all(bool((parameter == 0.5).all()) for parameter in model.parameters())
    name, *_ = whole
    with pytest.raises(CheckpointError, match="holds no adapters: it was saved without MiLoRAInit"):
        model.load_state_dict({key: value for key, value in whole.items() if key != name}, strict=False)
