"""Collecting statistics for the layers of a module, in as many passes over the data as memory requires."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from milora_lightning.adapters.candidates import base_of
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_linear, linear_shape
from milora_lightning.adapters.new_layers import saved_modules
from milora_lightning.adapters.parts import find_part, modules_inside
from milora_lightning.adapters.targets import select_layers
from milora_lightning.config import LoRAConfig
from milora_lightning.parallel.dtensor import home
from milora_lightning.starts import Start, Statistics, find_start
from milora_lightning.starts.statistics import Need
from milora_lightning.statistics.gradients import weight_gradients
from milora_lightning.statistics.moments import Moments, input_moments, say_if_few, shared_inputs
from milora_lightning.statistics.passes import Pass, Track, default_call
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.memory import available

SHARE = 0.4
"""Maximum share of a device's free memory for the sums; the start computed from them needs memory, too."""


def collect_statistics(
    module: nn.Module,
    batches: Iterable[Any],
    call: Callable[[Any], Any] | None = None,
    preserve: Iterable[Any] | None = None,
    config: LoRAConfig | None = None,
    track: Track = iter,
    device: torch.device | None = None,
    number: int = 0,
    size: int = 1,
) -> dict[str, Statistics]:
    """Collect the statistics that the start of a module's adapters needs, for :func:`milora_lightning.initialize`.

    During this, adapters are disabled and the module is in eval mode. Second moments of inputs take a forward pass over
    each batch, gradients also a backward pass. Sums are float32. Tokens that are masked in a batch's ``attention_mask``
    do not count; prompts do. Layers that read the same tensor are measured once. If the sums of all layers do not fit
    into the device's free memory, there are several passes over the batches, each for some of the layers.

    Args:
        module: A module with injected adapters, or, with ``config``, one that could have them.
        batches: Batches: mappings, sequences or tensors, which are moved to the module's device.
        call: Calls the module with a batch. If the start needs gradients, it must return the loss: a scalar, or an
            object with an attribute or entry ``loss``. By default the module's ``start_loss(batch)`` if it exists,
            otherwise the module itself: ``module(**batch)`` for mappings, ``module(*batch)`` for sequences.
        preserve: Batches of data to preserve, which ``"sc_lora"`` weighs against ``batches``.
        config: Configuration with the targets and the start, if no adapters have been injected yet.
        track: Wraps the iteration over the batches' indices in each pass, to show progress.
        device: Device of the sums; by default the module's.
        number: Index of this process's share of the batches, if several processes share them.
        size: Number of shares. All processes of torch's default group must call this function with the same batches.

    Returns:
        Statistics of each layer by name, on the CPU. Layers that share their inputs have the same tensors.

    Raises:
        ValueError: If there are no batches, the start does not depend on data, a layer is not linear or is split by
            tensor parallelism, or no batch reaches a layer.

    >>> from milora_lightning import LoRAConfig, initialize, inject
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = inject(model, LoRAConfig(r=2, init="lora_null"))
    >>> statistics = collect_statistics(model, [torch.randn(16, 8) for _ in range(4)])
    >>> statistics["0"].inputs.shape
    torch.Size([8, 8])
    >>> initialize(model, statistics=statistics)
    2
    """
    layers, needs = layers_with_needs(module) if config is None else targets_with_needs(module, config)
    if not needs:
        raise InvalidInputError("The start of these adapters takes nothing from data: initialize needs no statistics.")
    from lightning.fabric.utilities import move_data_to_device

    place = home(next(iter(module.parameters()))) if device is None else device
    ran = Pass(
        module,
        list(batches),
        call or default_call(module),
        partial(move_data_to_device, device=place),
        place,
        number,
        size,
        track=track,
    )
    found: dict[str, Statistics] = {}
    for group in in_groups(layers, needs, ran, None if preserve is None else list(preserve)):
        on_cpu = {id(t): t.cpu() for t in {id(t): t for each in group.values() for t in each if t is not None}.values()}
        found |= {name: Statistics(*(t if t is None else on_cpu[id(t)] for t in each)) for name, each in group.items()}
    return found


def layers_with_needs(module: nn.Module) -> tuple[dict[str, nn.Module], tuple[Need, ...]]:
    """Return the adapters that have no factors yet and whose start depends on data, and the statistics they need.

    Raises:
        ValueError: If statistics are not supported for one of these layers.
    """
    pending = {name: layer for name, layer in lora_layers(module).items() if not layer.initialized}
    start = next((find_start(layer.init) for layer in pending.values()), None)
    needs = () if start is None else start.needs
    if start is not None and needs:
        for name, layer in pending.items():
            _check(name, layer)
            _check_rank(name, layer, start)
    return (dict(pending) if needs else {}), needs


def targets_with_needs(module: nn.Module, config: LoRAConfig) -> tuple[dict[str, nn.Module], tuple[Need, ...]]:
    """Return the layers that a configuration would adapt, and the statistics that its start needs."""
    part = find_part(module, config.module)
    layers = select_layers(module, config, modules_inside(saved_modules(part, config))).layers
    for name, layer in layers.items():
        _check(name, layer)
    return layers, find_start(config.init).needs


def _check(name: str, layer: nn.Module) -> None:
    base = base_of(layer)
    if not is_linear(base):
        raise InvalidInputError(
            f"Layer {name!r} ({type(base).__name__}) is no linear layer, and only those start from data: leave it "
            "out (exclude_modules), or take another init."
        )
    if isinstance(layer, LoRALinear) and layer.part is not None:
        raise InvalidInputError(
            f"Layer {name!r} is split by tensor parallelism, where no rank sees all of its inputs: take another init, "
            "or shard by FSDP2 alone (tensor_parallel_size: 1)."
        )


def size_of(layers: Mapping[str, nn.Module], needs: Sequence[Need]) -> int:
    """Return an upper bound on the size of layers' statistics in bytes.

    Args:
        layers: The layers by name.
        needs: The statistics to collect.
    """
    return sum(_sizes(layers, needs).values())


def _sizes(layers: Mapping[str, nn.Module], needs: Sequence[Need]) -> dict[str, int]:
    copies = len({"inputs", "preserved"} & set(needs))
    shapes = {name: linear_shape(base_of(layer)) for name, layer in layers.items()}
    return {name: 4 * (n**2 * copies + m * n * ("gradient" in needs)) for name, (m, n) in shapes.items()}


def _check_rank(name: str, layer: LoRALinear, start: Start) -> None:
    smallest = min(layer.in_features, *(layer.parts or (layer.out_features,)))
    most = smallest // start.vectors
    if layer.r > most:
        raise InvalidInputError(
            f"{start.name} takes {start.vectors * layer.r} singular vectors for r={layer.r}, and layer {name!r} has "
            f"{smallest}{' in its smallest part' if layer.parts else ''}: set its rank to {most} at most "
            "(rank_pattern)."
        )


def in_groups(
    layers: Mapping[str, nn.Module],
    needs: Sequence[Need],
    over: Pass,
    preserve: Sequence[Any] | None = None,
    room: int | None = None,
) -> Iterator[dict[str, Statistics]]:
    """Collect and yield statistics for one group of layers at a time, such that each group fits into memory.

    Args:
        layers: The layers.
        needs: The statistics to collect.
        over: The pass.
        preserve: Batches of data to preserve.
        room: Bytes for the sums of a group; by default a share of the free memory.

    Raises:
        ValueError: If there are no batches, or they do not reach a layer.
    """
    if not over.batches or (preserve is not None and not preserve):
        raise InvalidInputError("There is no batch to take statistics from: give at least one.")
    if "preserved" in needs and preserve is None:
        raise InvalidInputError(
            "This start weighs what is to be learned against what is to be preserved: say which text that is "
            "(preserve, of MiLoRAInit or adapter), or give batches of it (preserve, of collect_statistics)."
        )
    room = _room(over) if room is None else room
    owners = shared_inputs(layers, over)
    said = over.number > 0
    for names in grouped(_sizes(layers, needs), owners, room, together="gradient" not in needs):
        some = {name: layers[name] for name in names}
        gradients = weight_gradients(some, over) if "gradient" in needs else {}
        sums = input_moments(some, owners, over) if "inputs" in needs else {}
        said = said or say_if_few(sums)
        learned = _means(sums)
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        if "preserved" in needs and preserve is not None:
            kept = _means(input_moments(some, owners, replace(over, batches=preserve)))
        yield {
            name: Statistics(
                learned.get(name, (None,))[0],
                gradients.get(name),
                learned.get(name, (None, None))[1],
                kept.get(name, (None,))[0],
            )
            for name in names
        }
        del gradients, sums, learned, kept  # free the memory for the next group


def _means(moments: Mapping[str, Moments]) -> dict[str, tuple[Tensor, Tensor]]:
    once = {id(each): each.means() for each in {id(m): m for m in moments.values()}.values()}
    return {name: once[id(each)] for name, each in moments.items()}


def grouped(sizes: Mapping[str, int], owners: Mapping[str, str], room: int, together: bool = True) -> list[list[str]]:
    """Divide layers into groups whose sums fit into a number of bytes; layers with the same inputs stay together.

    Args:
        sizes: Bytes of each layer's sums.
        owners: For each layer, the first layer that reads the same inputs.
        room: The number of bytes.
        together: Whether layers with the same inputs share one sum.

    >>> grouped({"q": 4, "k": 4, "o": 4, "up": 9}, {"q": "q", "k": "q", "o": "o", "up": "up"}, 8)
    [['q', 'k', 'o'], ['up']]
    """
    groups: list[list[str]] = []
    left = 0
    for owner in dict.fromkeys(owners.values()):
        names = [name for name in sizes if owners[name] == owner]
        size = sizes[owner] if together else sum(sizes[name] for name in names)
        if not groups or size > left:
            groups.append([])
            left = room
        groups[-1] += names
        left -= size
    return groups


def _room(over: Pass) -> int:
    """Return how many bytes the sums may take, the same on all ranks."""
    free = available(over.device.type)
    room = torch.tensor(2**62 if free is None else int(SHARE * free), device=over.device)
    if over.size > 1:
        dist.all_reduce(room, dist.ReduceOp.MIN)
    return int(room)
