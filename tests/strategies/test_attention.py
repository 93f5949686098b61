"""``nn.MultiheadAttention`` with adapters on two ranks, whose weights are in shards (FSDP2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.forked import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from milora_lightning import LoRAConfig, initialize, inject, lora_layers
from milora_lightning.parallel.dtensor import full_tensor
from milora_lightning.strategies import MiLoRAFSDPStrategy


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def own(parameter: Tensor) -> slice:
    """This rank's rows."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    first = dist.get_rank() * -(-len(parameter) // 2)
    return slice(first, first + len(parameter.to_local()))


def results(shard: bool) -> list[Tensor]:
    """Frozen weights, slices, outputs with and without gradients, and gradients."""
    model, x = encoder(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    inject(model, LoRAConfig(r=2))
    if shard:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    initialize(model, cache=False)
    layers = lora_layers(model).values()
    slices = [full_tensor(layer.lora_B.detach()) @ full_tensor(layer.lora_A.detach()) for layer in layers]
    with torch.no_grad():
        for layer in layers:  # the same, whatever signs the singular vectors have
            for factor, start in ((layer.lora_A, layer.initial_A), (layer.lora_B, layer.initial_B)):
                for parameter, value in ((factor, 0.3), (start, 0.1)):
                    local = parameter.to_local() if shard else parameter
                    local.copy_(
                        value * torch.arange(1, 1 + parameter.numel()).view(parameter.shape).sin()[own(parameter)]
                    )
    y = model.train()(x)
    y.square().sum().backward()
    gradients = [full_tensor(p.grad) for p in model.parameters() if p.requires_grad]
    bases = [full_tensor(p.detach()) for n, p in model.named_parameters() if n.endswith("in_proj_weight")]
    with torch.no_grad():
        return [*bases, *slices, y.detach(), model.eval()(x), *gradients]


def on_a_rank() -> None:
    dist.init_process_group("gloo")
    wanted, found = results(shard=False), results(shard=True)
    assert len(wanted) == len(found) == 28
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_compute_what_whole_weights_do(tmp_path: Path) -> None:
    codes = run_ranks(on_a_rank, tmp_path)
    assert codes == [0, 0], (tmp_path / "output0.txt").read_text()


def test_fsdp1_is_refused_as_it_would_write_the_sum() -> None:
    model = encoder()
    inject(model, LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"use FSDP2 .*or leave it out \(exclude_modules: \[in_proj\]\)"):
        MiLoRAFSDPStrategy().check_module(model)
    other = encoder()
    inject(other, LoRAConfig(r=2, exclude_modules=["in_proj"]))
    MiLoRAFSDPStrategy().check_module(other)
