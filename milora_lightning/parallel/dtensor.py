"""Tensors that are sharded among ranks (DTensors): gathering them, writing to them, and which part is on this rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from milora_lightning.utils.errors import InvalidInputError


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of a module is sharded by FSDP2.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every rank; all ranks must call this. Other tensors are returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_rank(tensor: Tensor, rank: int) -> Tensor | None:
    """Gather a sharded tensor on one rank, and return None on the others, which hold no more than their shards.

    All ranks must call this. Where groups of ranks replicate each other's shards, only that rank's group takes part.

    Args:
        tensor: Any tensor; one that is not sharded is returned unchanged, on every rank.
        rank: Global rank that gets it.

    Raises:
        ValueError: If it is sharded in more than one way, as under tensor parallelism.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    sharded = [(i, placement) for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not sharded:
        return tensor.to_local()
    (mesh_dim, placement) = sharded[0]
    if len(sharded) > 1 or type(placement) is not Shard:
        raise InvalidInputError(
            f"A weight placed as {tensor.placements} is sharded in more than one way, as under tensor parallelism, "
            "which the adapters' factors are not. Shard with fully_shard alone."
        )
    group = tensor.device_mesh.get_group(mesh_dim)
    ranks = dist.get_process_group_ranks(group)
    if rank not in ranks:
        return None
    shard = tensor.to_local().movedim(placement.dim, 0)
    size, chunk = tensor.shape[placement.dim], _chunk(tensor.shape[placement.dim], len(ranks))
    if len(shard) < chunk:  # the last ranks' shards, where the size is no multiple of the ranks
        shard = torch.cat([shard, shard.new_zeros(chunk - len(shard), *shard.shape[1:])])
    shard = shard.contiguous()
    receives = dist.get_rank() == rank
    gathered = shard.new_empty(chunk * len(ranks), *shard.shape[1:]) if receives else None
    parts = [as_bytes(part) for part in gathered.chunk(len(ranks))] if gathered is not None else None
    dist.gather(as_bytes(shard), parts, dst=rank, group=group)
    return gathered[:size].movedim(0, placement.dim) if gathered is not None else None


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return which part of a tensor this rank holds, as one slice for each dimension.

    >>> local_slices(torch.zeros(3, 2))
    (slice(0, 3, None), slice(0, 2, None))
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or []
        for placement, index, ranks in zip(tensor.placements, coordinate, tensor.device_mesh.shape, strict=True):
            if isinstance(placement, Shard):
                start, stop = bounds[placement.dim]
                chunk = _chunk(stop - start, ranks)
                bounds[placement.dim] = min(start + index * chunk, stop), min(start + (index + 1) * chunk, stop)
    return tuple(slice(start, stop) for start, stop in bounds)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that every rank has, placed like another tensor of the same shape."""
    if not isinstance(like, DTensor):
        return value
    local = value[local_slices(like)].to(like.device, copy=True)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Copy a tensor that every rank has into a parameter that may be sharded."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(value[local_slices(parameter)])


def _chunk(size: int, ranks: int) -> int:
    return -(-size // ranks)  # like torch.chunk: the last ranks may get less


def as_bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as bytes, because not every backend knows every dtype."""
    return tensor.view(-1).view(torch.uint8)


def memory_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes for hashing or writing; without a copy if it is on the CPU."""
    memory: memoryview = as_bytes(tensor.detach().cpu().contiguous()).numpy().data
    return memory
