"""Initialization: compute the adapters' factors from the weights they adapt.

For each layer, ``factors.py`` computes A₀ and B₀ from its start, and the adapter begins with A = A₀ and B = B₀.
``decomposing.py`` distributes the weights over ranks and threads.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from milora_lightning.adapters.decomposing import Batch, decompose_all
from milora_lightning.adapters.factor_cache import cached_factors
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import matrices_in
from milora_lightning.adapters.matrices import factors_by_matrix
from milora_lightning.parallel.dtensor import home, is_sharded
from milora_lightning.parallel.gathering import free_gathered
from milora_lightning.starts import Statistics
from milora_lightning.starts.methods import Pair
from milora_lightning.utils.memory import return_memory


def initialize(
    module: nn.Module,
    seed: int = 0,
    track: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    cache: bool = True,
    statistics: Mapping[str, Statistics] | None = None,
    only: Collection[str] | None = None,
) -> int:
    """Fill the adapters' factors from the weights they adapt.

    Adapters that already have their factors (initialized before, or restored from a checkpoint) are left alone. Weights
    are decomposed one at a time, so a device needs memory for one only, even if the model is on the CPU and does not
    fit on the device. On CPUs, small weights are decomposed in parallel, one per torch thread, with the same results.
    Ranks that hold the same weights, or shards of them, divide the work: each decomposes some weights and sends the
    results to the others, so all ranks end up with identical factors. With sharded weights, a rank on a CPU gathers the
    next weight while it decomposes the current one.

    Args:
        module: A module with injected adapters.
        seed: Seed of random starts (``"random"``, ``"lora"``, …). Each layer combines it with its name, so neither the
            order of layers nor other random draws matter.
        track: Wraps the iteration over the work, to show progress. Each batch holds at most one layer per rank.
        rank: This process's rank in torch's default process group. Only needed if each rank holds whole weights; with
            sharded weights it is determined automatically.
        world_size: Number of ranks; all of them must call this function.
        device: Device for the decompositions; by default the weight's.
        cache: Whether to read decompositions from the user's cache folder and write new ones to it.
        statistics: Statistics by layer name, from :func:`milora_lightning.collect_statistics`, for starts that depend
            on data (``"corda"``, ``"eva"``, …).
        only: Names of the layers to initialize; by default all.

    Returns:
        The number of matrices initialized, on all ranks together.

    Raises:
        ValueError: If a weight has NaN or infinite entries, or a start's statistics are missing. The message names the
            layer; all ranks raise, even if only one is affected.

    >>> from milora_lightning import LoRAConfig, inject
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = inject(model, LoRAConfig(r=2))
    >>> initialize(model), initialize(model)
    (1, 0)
    """
    free_gathered(module)
    if is_sharded(module):
        rank, world_size = dist.get_rank(), dist.get_world_size()

    def start(layer: LoRALinear, matrix: Tensor, r: int, name: str, unique: str, rows: slice) -> Pair:
        # One generator per matrix, so that cached results of others make no difference.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{unique}".encode()))
        known = None if statistics is None else statistics.get(name)
        if known is not None and known.gradient is not None and layer.parts:
            known = known._replace(gradient=known.gradient[rows])
        compute = cached_factors if cache else initial_factors
        return compute(matrix.to(device), r, layer.scaling, layer.init, generator, known)

    def decompose(name: str, layer: LoRALinear, weight: Tensor) -> Pair:
        return factors_by_matrix(name, layer, weight, partial(start, layer))

    pending = [(n, m) for n, m in lora_layers(module).items() if (only is None or n in only) and not m.initialized]
    for layer, (lora_A, lora_B) in decompose_all(pending, decompose, track, rank, world_size, device):
        layer.set_initial_factors(lora_A, lora_B)
    if pending:
        return_memory(device or home(pending[0][1].lora_A))
    return sum(matrices_in(layer) or 1 for _, layer in pending)
