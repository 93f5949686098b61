"""Sharded tensors (DTensors): gathering them, writing to them, and locating this rank's part."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from milora_lightning.utils.compat.torch import StridedShard
from milora_lightning.utils.errors import InvalidInputError


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of a module is sharded, by FSDP2 or tensor parallelism.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def home(tensor: Tensor) -> torch.device:
    """Return the device on which a tensor's ranks can communicate: for shards on the CPU, their mesh's device."""
    return torch.device(tensor.device_mesh.device_type) if isinstance(tensor, DTensor) else tensor.device


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every rank; all ranks must call this. Other tensors are returned unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    local, device = tensor.to_local(), home(tensor)
    if local.device.type != device.type:
        tensor = _of_local(local.to(device), tensor)
    return tensor.full_tensor()


def gather_to_rank(tensor: Tensor, rank: int) -> Tensor | None:
    """Gather a sharded tensor on one rank; return None on the others, which never hold more than their shards.

    All ranks must call this. If groups of ranks replicate each other's shards, only that rank's group takes part.

    Args:
        tensor: Any tensor; one that is not sharded is returned unchanged, on every rank.
        rank: Global rank that receives the tensor, on the device where the ranks communicate.

    Raises:
        ValueError: If each rank holds a partial sum of it.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, splits = tensor.device_mesh, _splits(tensor)
    here, there = list(mesh.get_coordinate() or []), (mesh.mesh == rank).nonzero().flatten().tolist()
    split_along = {split.mesh_dim for split in splits}
    if not there or any(a != b for i, (a, b) in enumerate(zip(here, there, strict=True)) if i not in split_along):
        return None
    part: Tensor | None = tensor.to_local().to(home(tensor))
    for split in reversed(splits):  # undo the last split first
        coordinate = [*here]
        here[split.mesh_dim] = coordinate[split.mesh_dim] = there[split.mesh_dim]
        part = _gather(cast(Tensor, part), split, mesh.get_group(split.mesh_dim), int(mesh.mesh[tuple(coordinate)]))
        if part is None:
            return None
    return part


def _gather(shard: Tensor, split: Split, group: dist.ProcessGroup, rank: int) -> Tensor | None:
    """Undo one split, on one rank of a group."""
    shard = shard.movedim(split.dim, 0)
    if len(shard) < split.chunk:  # the last ranks' shards, if the size is not divisible by the number of ranks
        shard = torch.cat([shard, shard.new_zeros(split.chunk - len(shard), *shard.shape[1:])])
    shard = shard.contiguous()
    receives = dist.get_rank() == rank
    gathered = shard.new_empty(split.chunk * split.ranks, *shard.shape[1:]) if receives else None
    parts = [as_bytes(part) for part in gathered.chunk(split.ranks)] if gathered is not None else None
    dist.gather(as_bytes(shard), parts, dst=rank, group=group)
    # Contiguous like the whole weight: in another layout, singular vectors might get other signs.
    return gathered[: split.size].movedim(0, split.dim).contiguous() if gathered is not None else None


class Split(NamedTuple):
    """One dimension of a tensor, split over the ranks along one dimension of a mesh.

    Attributes:
        mesh_dim: The dimension of the mesh.
        dim: The dimension of the tensor.
        size: Its size before this split, on this rank.
        ranks: The number of ranks.
        chunk: The size of a shard; the last ranks' shards may be smaller.
        place: The index of this rank's shard.
    """

    mesh_dim: int
    dim: int
    size: int
    ranks: int
    chunk: int
    place: int


def _splits(tensor: DTensor) -> list[Split]:
    """Return the splits of a tensor in order: FSDP splits a rank's part under tensor parallelism further."""
    mesh, sizes = tensor.device_mesh, list(tensor.shape)
    placements = [(i, p) for i, p in enumerate(tensor.placements) if not p.is_replicate()]
    splits = []
    for mesh_dim, placement in sorted(placements, key=lambda entry: isinstance(entry[1], StridedShard)):
        if not isinstance(placement, (Shard, StridedShard)):
            raise InvalidInputError(
                f"A weight placed as {tensor.placements} cannot be gathered: each rank holds a summand of it. Shard it "
                "with fully_shard."
            )
        size, ranks = sizes[placement.dim], mesh.size(mesh_dim)
        place, chunk = (mesh.get_coordinate() or [])[mesh_dim], -(-size // ranks)  # like torch.chunk
        splits.append(Split(mesh_dim, placement.dim, size, ranks, chunk, place))
        sizes[placement.dim] = max(0, min(chunk, size - place * chunk))
    return splits


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return which part of a tensor this rank holds, as one slice for each dimension.

    >>> local_slices(torch.zeros(3, 2))
    (slice(0, 3, None), slice(0, 2, None))
    """
    bounds = [(0, size) for size in tensor.shape]
    for split in _splits(tensor) if isinstance(tensor, DTensor) else ():
        start, stop = bounds[split.dim]
        first = start + split.place * split.chunk
        bounds[split.dim] = min(first, stop), min(first + split.chunk, stop)
    return tuple(slice(start, stop) for start, stop in bounds)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that every rank has, placed like another tensor of the same shape.

    Args:
        value: The whole tensor.
        like: A tensor of the same shape, sharded or not.
    """
    if not isinstance(like, DTensor):
        return value
    return _of_local(value[local_slices(like)].to(like.device, copy=True), like)


def _of_local(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Copy a tensor that every rank has into a parameter that may be sharded.

    Args:
        parameter: The parameter; changed in place.
        value: The whole tensor.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(value[local_slices(parameter)])


def as_bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as bytes, because not every backend knows every dtype."""
    return tensor.view(-1).view(torch.uint8)


def memory_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes for hashing or writing; without a copy if it is on the CPU."""
    memory: memoryview = as_bytes(tensor.detach().cpu().contiguous()).numpy().data
    return memory
