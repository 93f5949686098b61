"""Which part of a tensor a rank has, for every rank in turn, in one process: its group of ranks is imitated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from milora_lightning.parallel import gathering
from milora_lightning.parallel.dtensor import copy_into, local_slices, memory_of, shard_like
from milora_lightning.utils.compat.torch import StridedShard


@contextmanager
def mesh_of(rank: int, *sizes: int) -> Iterator[DeviceMesh]:
    """A mesh as a rank sees it; what ranks send one another goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=torch.Size(sizes).numel())
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=("data_parallel", "tensor_parallel")[: len(sizes)])
    finally:
        dist.destroy_process_group()


def placed(whole: Tensor, local: Tensor, mesh: DeviceMesh, *placements: object) -> DTensor:
    options = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(torch.zeros_like(local), mesh, placements, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "ranks", "dim"), [(7, 3, 0), (8, 4, 1), (2, 4, 0), (5, 4, 1)])
def test_shards_are_the_chunks_that_torch_makes(rows: int, ranks: int, dim: int) -> None:
    whole = torch.arange(rows * 3.0).view(rows, 3)
    whole = whole if dim == 0 else whole.T.contiguous()
    chunks = list(whole.chunk(ranks, dim))
    chunks += [whole.narrow(dim, 0, 0)] * (ranks - len(chunks))  # ranks for which nothing is left
    for rank, chunk in enumerate(chunks):
        with mesh_of(rank, ranks) as mesh:
            like = placed(whole, chunk, mesh, Shard(dim))
            assert torch.equal(whole[local_slices(like)], chunk)
            assert torch.equal(shard_like(whole, like).to_local(), chunk)
            copy_into(like, whole)
            assert torch.equal(like.to_local(), chunk)


@pytest.mark.parametrize("rows", [8, 5])
def test_what_tensor_parallelism_leaves_on_a_rank_is_sharded_again(rows: int) -> None:
    whole = torch.arange(rows * 3.0).view(rows, 3)
    for rank, (data, tensor) in enumerate(product(range(2), range(2))):
        with mesh_of(rank, 2, 2) as mesh:
            own = whole.chunk(2)[tensor].chunk(2)[data]
            like = placed(whole, own, mesh, StridedShard(0, split_factor=2), Shard(0))
            assert torch.equal(whole[local_slices(like)], own)
            across = placed(whole.T.contiguous(), own.T, mesh, Replicate(), Shard(0))
            assert local_slices(across)[0] == slice(2 * tensor, min(2 * tensor + 2, 3))


def test_gathered_weights_have_to_fit_into_a_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism leaves a rank its part of a weight also where FSDP2 has gathered it."""
    whole = torch.zeros(8, 4)  # 128 bytes
    with mesh_of(0, 2, 2) as mesh:
        module = nn.Module()
        split = placed(whole, whole[:2], mesh, StridedShard(0, split_factor=2), Shard(0))
        module.weight = nn.Parameter(placed(whole, whole[:4], mesh, Shard(0), Replicate()))
        assert gathering._gathered_size(module.weight) == 128
        assert gathering._gathered_size(split) == 64
        for free, fits in ((None, True), (160, True), (159, False)):
            monkeypatch.setattr(gathering, "available", lambda _, free=free: free)
            assert gathering._fit(module) == fits


def test_bytes_are_those_of_the_numbers_in_their_order() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)
    assert bytes(memory_of(tensor)) == bytes([1, 0, 2, 0, 3, 0, 4, 0])
    assert bytes(memory_of(tensor.T)) == bytes([1, 0, 3, 0, 2, 0, 4, 0])
