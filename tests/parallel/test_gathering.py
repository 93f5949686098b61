"""Tensors that two processes share come together whole, for any sizes."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.forked import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from milora_lightning.parallel import gathering
from milora_lightning.parallel.dtensor import copy_into, full_tensor, gather_to_rank, local_slices, shard_like
from milora_lightning.parallel.gathering import weights_gathered

SHAPES = ((4, 3), (5, 3), (1, 6), (3,))
"""Of the second and third, one rank has less than the other, or nothing."""


def gathered(ranks: int) -> None:
    mesh, me = init_device_mesh("cpu", (ranks,)), dist.get_rank()
    for shape in SHAPES:
        for dim in range(len(shape)):
            whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
            shared = distribute_tensor(whole, mesh, [Shard(dim)])
            assert torch.equal(full_tensor(shared), whole)
            for rank in range(ranks):
                found = gather_to_rank(shared, rank)
                assert (found is None) == (me != rank)
                if found is not None:
                    assert torch.equal(found, whole)
                    assert found.is_contiguous()
            assert torch.equal(whole[local_slices(shared)], shared.to_local())
            copy_into(shared, whole + 1)
            assert torch.equal(full_tensor(shared), whole + 1)
            again = shard_like(whole, shared)
            assert isinstance(again, DTensor)
            assert torch.equal(full_tensor(again), whole)
        for sides in ((1, ranks), (ranks, 1)):  # each rank a part, or a part of a part that is whole
            both = distribute_tensor(whole, init_device_mesh("cpu", sides), [Shard(0), Shard(0)])
            found = gather_to_rank(both, ranks - 1)
            assert found is None if me != ranks - 1 else torch.equal(found, whole)
    everywhere = distribute_tensor(whole, mesh, [Replicate()])
    assert (gather_to_rank(everywhere, ranks - 1) is None) == (me != ranks - 1)
    with pytest.raises(ValueError, match="each rank holds a summand"):
        gather_to_rank(DTensor.from_local(whole, mesh, [Partial()], run_check=False), 0)


def on_two_ranks() -> None:
    dist.init_process_group("gloo")
    gathered(2)


def test_shards_come_together_on_all_ranks(tmp_path: Path) -> None:
    statuses = run_ranks(on_two_ranks, tmp_path, limit=120)
    assert statuses == [0, 0], [(tmp_path / f"output{rank}.txt").read_text()[-2000:] for rank in range(2)]


@pytest.mark.usefixtures("one_rank")
def test_shards_come_together_on_one_rank_which_has_the_whole() -> None:
    gathered(1)


def test_tensors_that_nobody_shares_stay_as_they_are() -> None:
    whole = torch.ones(2, 3)
    assert full_tensor(whole) is whole
    assert gather_to_rank(whole, 1) is whole
    assert shard_like(whole, whole) is whole


def kept_gathered() -> None:
    dist.init_process_group("gloo")
    model = fully_shard(nn.Linear(8, 8), mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    x = torch.ones(2, 8)
    for enough in ((True, True), (True, False), (False, True), (False, False)):
        memory = 2**20 if enough[dist.get_rank()] else 8
        with patch.object(gathering, "available", lambda kind, memory=memory: memory), weights_gathered(model):
            model(x)
            assert isinstance(model.weight, DTensor) is not all(enough), enough
        assert isinstance(model.weight, DTensor)


def test_weights_stay_gathered_only_where_every_rank_has_the_memory(tmp_path: Path) -> None:
    """Ranks that gather at different times would wait for each other."""
    statuses = run_ranks(kept_gathered, tmp_path, limit=120)
    assert statuses == [0, 0], [(tmp_path / f"output{rank}.txt").read_text()[-2000:] for rank in range(2)]
