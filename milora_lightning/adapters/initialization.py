"""Initialization: the adapters' factors are computed from the weights that they adapt.

For each layer, ``factors.py`` turns what its start gives into A₀ and B₀, and the adapter starts from them: A = A₀ and
B = B₀. How the weights are shared out among ranks and threads is in ``decomposing.py``.
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
    are decomposed one at a time, so that a device needs no room for more, even if the model is on the CPU and larger
    than the device; on CPUs, as many small ones at a time as torch has threads, with the same results.
    Several ranks that hold the same weights, or shards of them, share the work: each decomposes its part and sends the
    others the result, so that all end with identical factors. Of sharded weights a rank
    on a CPU collects one while it decomposes the one before.

    Args:
        module: A module with injected adapters.
        seed: What random starts (``"random"``, ``"lora"``, …) derive from, together with the layer's name: neither
            the order of layers nor other random draws matter.
        track: Wraps the work list, to show progress. Its entries hold at most one layer for each rank.
        rank: This process's rank in torch's default process group. Only needed where each rank has all of the weights:
            for sharded weights it is known.
        world_size: Number of ranks, which must all call this.
        device: Where to decompose; by default on the weight's device.
        cache: Whether to read decompositions from the user's cache folder, and to write new ones to it.
        statistics: What data tell about layers, by their names, for starts that take it (``"corda"``, ``"eva"``, …),
            from :func:`milora_lightning.collect_statistics`.
        only: Names of the layers to fill; by default all.

    Returns:
        The number of matrices initialized, on all ranks together.

    Raises:
        ValueError: If a weight has non-finite entries, or a start's statistics are missing; names the layer. On all
            ranks, even if only one finds it.

    >>> from milora_lightning import LoRAConfig, inject
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = inject(model, LoRAConfig(r=2))
    >>> initialize(model), initialize(model)
    (1, 0)
    """
    if is_sharded(module):
        rank, world_size = dist.get_rank(), dist.get_world_size()

    def start(layer: LoRALinear, matrix: Tensor, r: int, name: str, unique: str, rows: slice) -> Pair:
        # A generator for each matrix: whether another one's result is cached must not matter.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{unique}".encode()))
        known = None if statistics is None else statistics.get(name)
        if known is not None and known.gradient is not None and layer.parts:
            known = known._replace(gradient=known.gradient[rows])
        compute = cached_factors if cache else initial_factors
        return compute(matrix.to(device), r, layer.scaling, layer.init, generator, known)

    def decompose(name: str, layer: LoRALinear, weight: Tensor) -> Pair:
        return factors_by_matrix(name, layer, weight, partial(start, layer))

    wanted = {name: layer for name, layer in lora_layers(module).items() if only is None or name in only}
    pending = [(name, layer) for name, layer in wanted.items() if not layer.initialized]
    for layer, (lora_A, lora_B) in decompose_all(pending, decompose, track, rank, world_size, device):
        layer.set_initial_factors(lora_A, lora_B)
    if pending:
        return_memory(device or home(pending[0][1].lora_A))
    return sum(matrices_in(layer) or 1 for _, layer in pending)
