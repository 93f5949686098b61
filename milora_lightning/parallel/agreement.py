"""What the ranks of a tensor-parallel group must agree on, because they compute each layer together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from milora_lightning.parallel.dtensor import memory_of
from milora_lightning.utils.errors import InvalidInputError


def same_random_state(mesh: DeviceMesh, device: torch.device) -> None:
    """Copy the first rank's random state to all ranks of a one-dimensional mesh.

    Args:
        mesh: The ranks.
        device: Device whose generator is synchronized, in addition to the CPU's.
    """
    if mesh.size() == 1:
        return
    group = mesh.get_group()
    first = dist.get_process_group_ranks(group)[0]
    state = torch.get_rng_state().to(device)
    dist.broadcast(state, src=first, group=group)
    torch.set_rng_state(state.cpu())
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(device)
        dist.broadcast(state, src=first, group=group)
        torch.cuda.set_rng_state(state.cpu(), device)


def check_same_batch(mesh: DeviceMesh, batch: Any) -> None:
    """Refuse batches that differ among the ranks of a one-dimensional mesh.

    Args:
        mesh: The ranks.
        batch: This rank's batch: tensors, possibly in mappings and sequences.

    Raises:
        ValueError: On all ranks, if the batches differ.
    """
    if mesh.size() == 1:
        return
    digest = xxhash.xxh3_128()
    for tensor in _tensors(batch):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(memory_of(tensor))
    digests: list[Any] = [None] * mesh.size()
    dist.all_gather_object(digests, digest.hexdigest(), group=mesh.get_group())
    if len(set(digests)) > 1:
        raise InvalidInputError(
            "The ranks of a tensor-parallel group have different batches, but compute each layer together: draw the "
            "order of the data from one seed (seed_everything), and let the Trainer's distributed sampler share it out."
        )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
