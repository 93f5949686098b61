"""What test_experts.py of strategies checks on two processes without a Trainer: experts and convolutions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.models import MIXTURES
from milora_lightning import LoRAConfig, initialize, inject, load_peft, lora_layers
from milora_lightning.callbacks._checks import say_without_gradient
from milora_lightning.models.sharding import reduce_unused, shard
from milora_lightning.parallel.dtensor import full_tensor, local_slices

EXPERTS = 5
"""Not a multiple of the two ranks, which hold shards of three and of two matrices."""
WAYS = ("eager", "grouped_mm")


def mixture(kind: str = "qwen3_moe") -> PreTrainedModel:
    """A mixture of five experts, the same at every call."""
    config = MIXTURES[kind]
    setattr(config, "num_experts" if hasattr(config, "num_experts") else "num_local_experts", EXPERTS)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def routed_by_token(way: str) -> PreTrainedModel:
    """A mixture with adapters: tokens below 64 go to two of its experts, others to two others, none to the fifth."""
    model = mixture()
    model.set_experts_implementation(way)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = torch.where(torch.arange(128) < 64, 2.0, -2.0)
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:, 0] = torch.tensor([2.0, 1.9, -2.0, -1.9, 0.0])
    inject(model, LoRAConfig(r=3))
    return model


def ids_of(rank: int) -> Tensor:
    return torch.arange(20).view(2, 10) + 5 + 64 * rank


def loss_of(model: Callable[..., Any], rank: int) -> Tensor:
    loss: Tensor = model(input_ids=ids_of(rank), labels=ids_of(rank), use_cache=False).loss
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.removeprefix("module."): full_tensor(p.grad).clone() for name, p in named if p.grad is not None}


def starved_run(way: str) -> dict[str, Any]:
    """Compare gradients where each rank's tokens go to two of the five experts: whole, under DDP, and in shards."""
    whole, replica, shards = (routed_by_token(way) for _ in range(3))
    shard(shards, init_device_mesh("cpu", (2,)))
    for model in (whole, replica, shards):
        initialize(model, cache=False, rank=dist.get_rank(), world_size=2)
        model.train()
    (sum(loss_of(whole, rank) for rank in range(2)) / 2).backward()
    for model in (DistributedDataParallel(replica), shards):
        loss_of(model, dist.get_rank()).backward()
    held = lora_layers(shards)["model.layers.0.mlp.experts.down_proj"].lora_A
    return {
        "whole": gradients(whole),
        "ddp": gradients(replica),
        "fsdp2": gradients(shards),
        "held": len(range(EXPERTS)[local_slices(held)[0]]),
    }


class Choosing(nn.Module):
    """Experts that are layers of their own, of which each rank calls another one, and nobody the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.common = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, rank: int) -> Tensor:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(rank))
        return self.experts[rank](self.common(x)).square().mean()  # type: ignore[no-any-return]


def unused_run() -> dict[str, Any]:
    """Compare gradients where the ranks call different layers: in shards, and of one process."""
    found: dict[str, Any] = {}
    for name in ("whole", "fsdp2"):
        model = Choosing()
        inject(model, LoRAConfig(r=2))
        initialize(model, cache=False)
        if name == "fsdp2":
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            reduce_unused(model)
        mine = [dist.get_rank()] if name == "fsdp2" else [0, 1]
        (sum(model(rank) for rank in mine) / len(mine)).backward()
        found[name] = gradients(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        say_without_gradient(model, optimizer)
    return {**found, "said": [str(each.message) for each in said]}


def read_run(folder: Path) -> dict[str, Any]:
    """Load into shards what PEFT has trained on experts."""
    torch.manual_seed(2)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    theirs = get_peft_model(mixture(), LoraConfig(r=2, lora_alpha=6, **targets))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    if dist.get_rank() == 0:
        theirs.save_pretrained(folder)
    dist.barrier()
    model = mixture()
    inject(model, LoRAConfig(r=2, lora_alpha=6, init="lora", **targets))
    shard(model, init_device_mesh("cpu", (2,)))
    load_peft(model, folder)
    with torch.no_grad():
        return {"here": model.eval()(ids_of(0)).logits, "there": theirs.eval()(ids_of(0)).logits}


class Pictures(nn.Module):
    """Convolutions of each kind, in two blocks that are sharded by themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 10, 3, stride=2), nn.GELU(), nn.Conv2d(10, 10, 3, groups=5))
        self.second = nn.Sequential(nn.Conv2d(10, 9, 1), nn.Conv2d(9, 9, 3, groups=9, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x))).square().mean()  # type: ignore[no-any-return]


def convolution_run() -> dict[str, Any]:
    """Compare convolutions in shards, some of them uneven, with whole ones: starts, gradients and updates."""
    found: dict[str, Any] = {}
    pictures = torch.randn(2, 4, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    for name in ("whole", "shards"):
        model = Pictures()
        inject(model, LoRAConfig(r=3, target_modules=".*", rank_pattern={"first.2": 5, "second.1": 9}))
        if name == "shards":
            mesh = init_device_mesh("cpu", (2,))
            for block in (model.first, model.second, model):
                fully_shard(block, mesh=mesh)
        initialize(model, cache=False)
        found[name] = {f"start of {n}": full_tensor(layer.lora_A).clone() for n, layer in lora_layers(model).items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            mine = [dist.get_rank()] if name == "shards" else [0, 1]
            (sum(model(pictures[rank]) for rank in mine) / len(mine)).backward()
            optimizer.step()
        found[name] |= {f"gradient of {n}": gradient for n, gradient in gradients(model).items()}
        found[name] |= {f"end of {n}": full_tensor(layer.lora_B).clone() for n, layer in lora_layers(model).items()}
    return found


def expert_runs(folder: Path) -> dict[str, Any]:
    return {
        "starved": {way: starved_run(way) for way in WAYS},
        "unused": unused_run(),
        "read": read_run(folder / "experts-of-peft"),
        "convolutions": convolution_run(),
    }
