"""The second step of surgery: fill the adapters' factors from the weights that they adapt."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.distributed as dist
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from milora_lightning.adapters.base_weight import pretrained_weight
from milora_lightning.adapters.factor_cache import cached_factors
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear, linear_shape
from milora_lightning.parallel.dtensor import is_sharded
from milora_lightning.parallel.work import cost, in_rounds, raise_together, share_out
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError

Factors = tuple[Tensor, Tensor]
"""``lora_A`` (r, in) and ``lora_B`` (out, r), whole."""

Batch = list[tuple[str, LoRALinear, int]]
"""Name, layer and owning rank of weights that are decomposed at the same time, at most one by each rank."""

SMALL = cost((1536, 6144))
"""Up to this cost a weight is decomposed in one thread, several at a time; larger ones would need too much memory."""


def initialize(
    module: nn.Module,
    seed: int = 0,
    track: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    cache: bool = True,
) -> int:
    """Fill the adapters' factors from the weights they adapt.

    Adapters that have their factors already (initialized before, or restored from a checkpoint) are left alone. Weights
    are decomposed one at a time, but small ones, on CPUs, as many as torch has threads, with the same results.
    Several ranks that hold the same weights, or shards of them, share the work: each decomposes its part and sends the
    others the result, so that all end with identical factors. Of sharded weights a rank collects one while it
    decomposes the one before.

    Args:
        module: A module with injected adapters.
        seed: What random starts (``"random"``, ``"lora"``) derive from, together with the layer's name: neither
            the order of layers nor other random draws matter.
        track: Wraps the work list, to show progress. Its entries hold at most one layer for each rank.
        rank: This process's rank in torch's default process group. Needed only where each has all of the weights:
            that they are sharded shows.
        world_size: Number of ranks, which must all call this.
        device: Where to decompose; by default on the weight's device.
        cache: Whether to keep the decompositions in the user's cache folder, and to take them from there.

    Returns:
        The number of weights initialized, those of all ranks together.

    Raises:
        ValueError: If a weight has non-finite entries; names the layer. On all ranks, whichever found it.

    >>> from milora_lightning import LoRAConfig, inject
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = inject(model, LoRAConfig(r=2))
    >>> initialize(model), initialize(model)
    (1, 0)
    """
    pending = [(name, layer) for name, layer in lora_layers(module).items() if not layer.initialized]
    sharded = is_sharded(module)
    if sharded:
        rank, world_size = dist.get_rank(), dist.get_world_size()
    shapes = [linear_shape(layer.base_layer) for _, layer in pending]
    owners = share_out(shapes, world_size)
    rounds = [[(*pending[i], owners[i]) for i in batch] for batch in in_rounds(owners, [cost(s) for s in shapes])]

    def decompose(name: str, layer: LoRALinear, weight: Tensor) -> Factors:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        compute = cached_factors if cache else initial_factors
        with _naming(name):
            return compute(weight.to(device), layer.r, layer.scaling, layer.init, generator)

    on_cpu = all((device or layer.base_layer.weight.device).type == "cpu" for _, layer in pending)
    jobs = _start_jobs(decompose, track(rounds), rank, on_cpu)
    errors = [error for job in jobs.values() if (error := job.exception())]
    raise_together(errors[0] if errors else None, world_size)
    factors = {layer: job.result() for layer, job in jobs.items()}
    layers = [layer for _, layer in pending]
    if world_size > 1:
        _exchange_factors(layers, owners, factors, device)
    else:
        for layer in layers:
            layer.set_initial_factors(*factors.pop(layer))
    return len(pending)


def _start_jobs(
    decompose: Callable[[str, LoRALinear, Tensor], Factors], rounds: Iterable[Batch], rank: int, on_cpu: bool
) -> dict[LoRALinear, Future[Factors]]:
    """Decompose this rank's weights, collecting one while those before are decomposed; wait until all have ended.

    After a failure there are no more, but weights are still collected where other ranks need this one for theirs.
    """
    jobs: dict[LoRALinear, Future[Factors]] = {}
    failed = False

    def shares_processor(batch: Batch) -> bool:
        return on_cpu and any(
            owner == rank and cost(linear_shape(layer.base_layer)) <= SMALL for _, layer, owner in batch
        )

    for together, batches in groupby(rounds, shares_processor):
        size = torch.get_num_threads() if together else 1
        unfinished: deque[Future[Factors]] = deque()
        with _single_threaded(size) if together else ThreadPoolExecutor(1) as workers:
            for batch in batches:
                if len(unfinished) > size:  # one that waits is enough: weights in shards take memory
                    failed = unfinished.popleft().exception() is not None or failed
                for name, layer, owner in batch:
                    if is_sharded(layer) or (owner == rank and not failed):
                        with _naming(name):
                            weight = pretrained_weight(layer, owner)
                        if owner == rank and weight is not None and not failed:
                            jobs[layer] = workers.submit(decompose, name, layer, weight)
                            unfinished.append(jobs[layer])
        failed = failed or any(job.exception() for job in unfinished)
    return jobs


def _exchange_factors(
    layers: Sequence[LoRALinear],
    owners: Sequence[int],
    factors: dict[LoRALinear, Factors],
    device: torch.device | None = None,
) -> None:
    """Start each layer from the factors that its owner has computed, on all ranks.

    Args:
        layers: The layers, in the same order on all ranks.
        owners: The rank that has the factors of each.
        factors: Those that this rank has; emptied on the way.
        device: Where they are; by default on the layers' device.
    """
    for layer, owner in zip(layers, owners, strict=True):
        computed = factors.pop(layer, None)
        if computed is None:
            home = device or layer.lora_A.device
            computed = torch.empty(layer.lora_A.shape, device=home), torch.empty(layer.lora_B.shape, device=home)
        for factor in computed:
            dist.broadcast(factor, src=owner)
        layer.set_initial_factors(*computed)


@contextmanager
def _single_threaded(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Provide workers with one thread each, in which results do not depend on their number."""
    threads = torch.get_num_threads()
    with ThreadpoolController().limit(limits=1, user_api="blas"):  # numpy's and scipy's
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as executor:
                yield executor
        finally:
            torch.set_num_threads(threads)  # what threads that start later take over


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except MiLoRAError as error:
        raise InvalidInputError(f"The weight of layer {name!r} cannot be decomposed: {error}") from error
