"""Second moments of layers' inputs, summed in float32 where the layers are, without waiting for the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from milora_lightning.adapters.candidates import base_of
from milora_lightning.adapters.linear_layers import linear_shape
from milora_lightning.linalg.single import full_precision
from milora_lightning.parallel.work import raise_on_all_ranks
from milora_lightning.statistics.passes import Pass, arguments_of, counted_rows, tells_of
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

Calls = dict[str, tuple[int, ...]]
"""For each layer, the numbers of its input tensors in a forward pass."""


class Moments:
    """Sums over tokens x of x xᵀ and x.

    Args:
        features: Number of features of x.
        device: Where the sums are kept.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.products = torch.zeros(features, features, device=device)
        self.sums = torch.zeros(features, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, x: Tensor, counted: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x: Inputs (..., features).
            counted: Which of them count, in any shape with the same number of entries; None for all.
        """
        with torch.autocast(x.device.type, enabled=False), full_precision():
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            if counted is None:
                self.count += len(rows)
            else:
                rows = torch.where(counted.reshape(-1, 1), rows, 0.0)  # padding may hold anything, including NaN
                self.count += counted.sum()
            self.products.addmm_(rows.mT, rows)
            self.sums += rows.sum(0)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums, which may be summed over ranks in place."""
        return self.products, self.sums, self.count

    def means(self) -> tuple[Tensor, Tensor]:
        """Compute E[x xᵀ] (features, features) and E[x] (features,), overwriting the sums."""
        return self.products.div_(self.count), self.sums.div_(self.count)


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[Calls]:
    """Within this context, call ``see`` with the name and the input of each layer before it computes.

    Yields:
        The numbers of each layer's inputs, to be cleared between forward passes. Consecutive layers that read the same
        tensor, like those of an attention block, have the same number.
    """
    calls: Calls = {}
    last: list[Any] = [None, None, 0]

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = arguments_of(layer, args, kwargs)[0]
            writes = None if x.is_inference() else x._version  # a tensor that is written to holds other inputs then
            if x is not last[0] or writes != last[1]:  # last keeps it alive, so its identity is unique
                last[:] = x, writes, last[2] + 1
            calls[name] = (*calls.get(name, ()), last[2])
            see(name, x)

        return hook

    hooks = [layer.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def shared_inputs(layers: Mapping[str, nn.Module], over: Pass) -> dict[str, str]:
    """Run a batch, and return for each layer the first layer that reads the same tensors.

    Raises:
        ValueError: If the module does not call a layer.
    """
    with watching(layers, lambda name, x: None) as calls:
        over.first()
    if missing := [name for name in layers if name not in calls]:
        raise InvalidInputError(
            f"Nothing reaches layer {missing[0]!r} when the module runs, so that data tell nothing about it: leave it "
            "out (exclude_modules), or give batches that use it."
        )
    firsts: dict[tuple[int, ...], str] = {}
    return {name: firsts.setdefault(calls[name], name) for name in layers}


def input_moments(layers: Mapping[str, nn.Module], owners: Mapping[str, str], over: Pass) -> dict[str, Moments]:
    """Sum up the second moments of layers' inputs in one pass, over all ranks.

    Args:
        layers: The layers.
        owners: For each layer, the first layer that reads the same inputs; see :func:`shared_inputs`.
        over: The pass.

    Returns:
        The moments of each layer; layers with the same inputs have the same object.

    Raises:
        ValueError: If layers share inputs in some batches only, or no token counts.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in layers:
        groups[owners[name]].append(name)
    moments = {name: Moments(linear_shape(base_of(layers[name]))[1], over.device) for name in groups}
    counted: Tensor | None = None
    counts = True
    problem: InvalidInputError | None = None

    def see(name: str, x: Tensor) -> None:
        if name not in groups:
            return
        mask = counted if counted is not None and tells_of(counted, x.shape[:-1]) else None
        moments[name].add(x, mask if counts else x.new_zeros(x.shape[:-1], dtype=torch.bool))

    with watching(layers, see) as calls:
        for batch, is_counted in over.run():
            counts = is_counted
            counted = counted_rows(batch)
            calls.clear()
            over.call_with(batch)
            problem = problem or _not_shared(groups, calls)
    raise_on_all_ranks(problem, over.size)
    for each in moments.values():
        over.sum_over_ranks(each.parts)
    if unseen := [name for name, each in moments.items() if not each.count]:
        raise InvalidInputError(
            f"No token of the batches that counts reaches layer {unseen[0]!r}, so that data tell nothing about it: "
            "leave it out (exclude_modules), or give batches whose attention_mask is not zero everywhere."
        )
    return {name: moments[owners[name]] for name in layers}


def say_if_few(moments: Mapping[str, Moments]) -> bool:
    """Warn if there are fewer tokens than features, and return whether there are."""
    few = {name: each for name, each in moments.items() if int(each.count) < len(each.sums)}
    if few:
        name, each = max(few.items(), key=lambda item: len(item[1].sums))
        warn(
            f"Statistics of {int(each.count)} tokens leave some of the {len(each.sums)} directions of the inputs of "
            f"layer {name!r} unseen, and which of these a start from rarely used directions takes is left open: raise "
            "statistics_batches, or give more batches."
        )
    return bool(few)


def _not_shared(groups: Mapping[str, Sequence[str]], calls: Calls) -> InvalidInputError | None:
    for owner, names in groups.items():
        for name in names:
            if calls.get(name) != calls.get(owner):
                return InvalidInputError(
                    f"Layers {owner!r} and {name!r} have the same inputs for some batches only, which statistics of "
                    "both at once do not allow for: give one of them to exclude_modules."
                )
    return None
