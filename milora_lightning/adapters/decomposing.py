"""Decomposing many weights, distributed over ranks and, on CPUs, over threads, with the same results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.distributed as dist
from threadpoolctl import ThreadpoolController
from torch import Tensor

from milora_lightning.adapters.base_weight import pretrained_weight
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import linear_shape, matrices_in
from milora_lightning.linalg.devices import decomposing
from milora_lightning.parallel.dtensor import home, is_sharded
from milora_lightning.parallel.work import cost, partition_by_cost, raise_on_all_ranks, schedule_rounds
from milora_lightning.starts.methods import Pair
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError

Decompose = Callable[[str, LoRALinear, Tensor], Pair]
"""Computes the factors of a layer from its name, the layer and its weight (out, in)."""

Batch = list[tuple[str, LoRALinear, int]]
"""(name, layer, rank) of weights that are decomposed at the same time, at most one per rank."""

SMALL = cost((1536, 6144))
"""Weights up to this cost are decomposed in parallel, one per thread; larger ones would need too much memory."""


def decompose_all(
    layers: Sequence[tuple[str, LoRALinear]],
    decompose: Decompose,
    track: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
) -> Iterator[tuple[LoRALinear, Pair]]:
    """Decompose the weights of layers and yield each layer's factors; if one fails, nothing is yielded.

    On devices other than the CPU, this takes the memory of one weight at a time: the next one is gathered when the
    previous one is done, and finished factors wait on the CPU.

    Args:
        layers: Layers with their names, in the same order on all ranks.
        decompose: Computes a layer's factors; called on one rank for each layer.
        track: Wraps the iteration over batches, to show progress.
        rank: This process's rank.
        world_size: Number of ranks; all of them must call this.
        device: Where weights are decomposed; by default on the layers' device.

    Raises:
        ValueError: On all ranks, if a weight cannot be decomposed. The message names the layer.
    """
    shapes = [linear_shape(layer.base_layer) for _, layer in layers]
    numbers = [matrices_in(layer) or 1 for _, layer in layers]
    costs = [cost(shape) * number for shape, number in zip(shapes, numbers, strict=True)]
    owners = partition_by_cost(shapes, world_size, numbers)
    rounds = [[(*layers[i], owners[i]) for i in batch] for batch in schedule_rounds(owners, costs)]
    on_cpu = all((device or home(layer.base_layer.weight)).type == "cpu" for _, layer in layers)

    jobs = _run_jobs(decompose, track(rounds), rank, on_cpu)
    errors = [error for job in jobs.values() if (error := job.exception())]
    raise_on_all_ranks(errors[0] if errors else None, world_size)
    factors = {layer: job.result() for layer, job in jobs.items()}
    jobs.clear()
    for (_, layer), owner in zip(layers, owners, strict=True):
        pair = factors.pop(layer, None)
        yield layer, pair if pair is not None and world_size == 1 else _broadcast(layer, owner, pair, device)


def _run_jobs(decompose: Decompose, rounds: Iterable[Batch], rank: int, on_cpu: bool) -> dict[LoRALinear, Future[Pair]]:
    """Decompose this rank's weights, gathering the next one in the meantime, and wait until all are done.

    After a failure no more are started, but this rank still takes part in gathering weights for other ranks.
    """
    jobs: dict[LoRALinear, Future[Pair]] = {}
    failed = False

    def has_small(batch: Batch) -> bool:
        costs = (cost(linear_shape(layer.base_layer)) for _, layer, owner in batch if owner == rank)
        return on_cpu and any(c <= SMALL for c in costs)

    for small, batches in groupby(rounds, has_small):
        size = torch.get_num_threads() if small else 1
        most = size + 1 if on_cpu else 1  # running or waiting: each gathered weight takes memory
        unfinished: deque[Future[Pair]] = deque()
        with _single_threaded(size) if small else ThreadPoolExecutor(1) as workers:
            for batch in batches:
                if len(unfinished) >= most:
                    failed = unfinished.popleft().exception() is not None or failed
                for name, layer, owner in batch:
                    if is_sharded(layer) or (owner == rank and not failed):
                        with _naming(name):
                            weight = pretrained_weight(layer, owner)
                        if owner == rank and weight is not None and not failed:
                            jobs[layer] = workers.submit(_decompose_one, decompose, name, layer, [weight])
                            unfinished.append(jobs[layer])
                        del weight  # otherwise it would be kept while the next one is gathered
        failed = failed or any(job.exception() for job in unfinished)
    return jobs


def _decompose_one(decompose: Decompose, name: str, layer: LoRALinear, weight: list[Tensor]) -> Pair:
    """Decompose a weight taken out of a list, because a thread keeps its arguments alive after its result is ready."""
    with _naming(name):
        lora_A, lora_B = decompose(name, layer, weight.pop())
        return lora_A.cpu(), lora_B.cpu()


def _broadcast(layer: LoRALinear, owner: int, pair: Pair | None, device: torch.device | None) -> Pair:
    """Send the factors of a layer from the rank that has computed them to all others."""
    place = device or home(layer.lora_A)
    if pair is None:
        pair = torch.empty(layer.lora_A.shape, device=place), torch.empty(layer.lora_B.shape, device=place)
    pair = pair[0].to(place), pair[1].to(place)
    for factor in pair:
        dist.broadcast(factor, src=owner)
    return pair


@contextmanager
def _single_threaded(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Provide workers that compute with one thread each, so that results do not depend on their number."""
    threads = torch.get_num_threads()
    with ThreadpoolController().limit(limits=1, user_api="blas"):  # numpy's and scipy's
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as executor:
                yield executor
        finally:
            torch.set_num_threads(threads)  # threads that start later inherit this


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        with decomposing(name):
            yield
    except MiLoRAError as error:
        raise InvalidInputError(f"The weight of layer {name!r} cannot be decomposed: {error}") from error
