"""Which adapters get a gradient is known to all ranks, whichever of them has a part of it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from helpers.forked import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from milora_lightning.callbacks._checks import _reached


def on_two_ranks() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def shared(value: float) -> Tensor:
        return DTensor.from_local(torch.full((2, 3), value), mesh, [Shard(0)])

    def factor(gradient: float | None) -> nn.Parameter:
        parameter = nn.Parameter(shared(1.0))
        parameter.grad = None if gradient is None else shared(gradient)
        return parameter

    mine = float(dist.get_rank() == 1)
    layers = [[factor(2.0), factor(0.0)], [factor(0.0), factor(mine)], [factor(0.0), factor(0.0)], [factor(None)]]
    assert _reached(layers) == [True, True, False, False]


def test_a_layer_is_reached_where_any_rank_has_a_gradient(tmp_path: Path) -> None:
    statuses = run_ranks(on_two_ranks, tmp_path, limit=120)
    assert statuses == [0, 0], [(tmp_path / f"output{rank}.txt").read_text()[-2000:] for rank in range(2)]
