"""Keeping FSDP2's weights gathered over many calls, for generation, which calls the model for every token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from milora_lightning.utils.compat.torch import reshard_settings
from milora_lightning.utils.memory import available

TENSOR = "tensor_parallel"
"""Lightning's name of the mesh dimension of tensor parallelism."""

SHARE = 0.8
"""Maximum share of a device's free memory that gathered weights may take; the rest is for keys and values."""


@contextmanager
def weights_gathered(module: nn.Module) -> Iterator[None]:
    """Within this context, FSDP2 gathers each weight at its first use only, and frees it at the end of the context.

    If the whole weights do not fit into the free memory of every rank's device, each call still gathers and frees them.
    All ranks must enter the context together.

    Args:
        module: Any module; without FSDP2 units in it, nothing changes.

    >>> with weights_gathered(nn.Linear(2, 2)):
    ...     pass
    """
    units = [child for child in module.modules() if isinstance(child, FSDPModule)]
    if not units or not _fit(module):
        yield
        return
    restore = [reshard_settings(unit) for unit in units]
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for unit, before in zip(units, restore, strict=True):
            before()
            unit.reshard()


def free_gathered(module: nn.Module) -> None:
    """Make FSDP2 free weights that forward passes have left gathered.

    While they are gathered, a module's parameters are not its shards: writes to them are lost, and optimizers do not
    have them.

    >>> free_gathered(nn.Linear(2, 2))
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def _fit(module: nn.Module) -> bool:
    """Whether a module's gathered weights fit on the devices of all ranks."""
    sharded = [p for p in module.parameters() if isinstance(p, DTensor)]
    if not sharded:  # gathered already
        return True
    needed = sum(_gathered_size(p) for p in sharded)
    device = torch.device(sharded[0].device_mesh.device_type)
    free = available(device.type)
    fits = torch.tensor(int(free is None or needed <= SHARE * free), device=device)
    dist.all_reduce(fits, dist.ReduceOp.MIN)  # ranks that gather at different times would wait for each other
    return bool(fits)


def _gathered_size(parameter: DTensor) -> int:
    """Return the bytes of a parameter gathered by FSDP2, which may still be a rank's part under tensor parallelism."""
    mesh, names = parameter.device_mesh, parameter.device_mesh.mesh_dim_names or ()
    split = [i for i, p in enumerate(parameter.placements) if names and names[i] == TENSOR and not p.is_replicate()]
    return parameter.numel() * parameter.element_size() // math.prod(mesh.size(i) for i in split)
