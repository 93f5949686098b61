"""Passes over batches: how a module is called, which batches a rank takes, and who measures while it runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from milora_lightning.adapters.contexts import adapters_disabled
from milora_lightning.parallel.work import in_step
from milora_lightning.utils.modes import eval_mode

Track = Callable[[Sequence[int]], Iterable[int]]
"""Wraps the numbers of the batches of a pass, to show progress."""


@dataclass(frozen=True)
class Pass:
    """How a module runs over batches.

    Attributes:
        module: The module; adapters are off and it is in eval mode while it runs.
        batches: All batches, the same on each rank, which takes every ``size``-th.
        call: Calls the module for a batch on its device, and returns the loss, where one is asked for.
        place: Moves a batch to the device.
        device: Where sums are kept.
        number: Which share of the batches this rank takes.
        size: Number of shares. With more than one, sums are over all ranks of torch's default process group.
        context: Makes a context for calls, such as autocast's.
        track: Shows progress.
    """

    module: nn.Module
    batches: Sequence[Any]
    call: Callable[[Any], Any]
    place: Callable[[Any], Any]
    device: torch.device
    number: int = 0
    size: int = 1
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    track: Track = iter

    def run(self, gradients: bool = False) -> Iterator[tuple[Any, bool]]:
        """Yield each of this rank's batches, placed, and whether it counts; what follows has to call the module."""
        with torch.set_grad_enabled(gradients), self._prepared():
            for batch, counts in in_step(self.batches, self.number, self.size, self.track):
                yield self.place(batch), counts

    def first(self) -> None:
        """Run the first batch alone."""
        with torch.no_grad(), self._prepared():
            self.call_with(self.place(self.batches[0]))

    def call_with(self, batch: Any) -> Any:
        """Call the module."""
        with self.context():
            return self.call(batch)

    def sum_over_ranks(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        # Compiled code knows nothing of hooks that come and go.
        with adapters_disabled(self.module), eval_mode(self.module), torch.compiler.set_stance("force_eager"):
            yield


@contextmanager
def recomputing(module: nn.Module) -> Iterator[None]:
    """Within this context, transformers' layers that recompute their activations in training do so in eval mode, too.

    Without it, a backward pass would keep the activations of all layers, for which there may be no room.
    """
    transformers = sys.modules.get("transformers.modeling_layers")  # not imported: then there is no such layer
    kind = () if transformers is None else transformers.GradientCheckpointingLayer
    layers: list[Any] = [m for m in module.modules() if isinstance(m, kind) and m.gradient_checkpointing]
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(_recomputed, layer, layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            if own is not None:
                layer.forward = own


def _recomputed(layer: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given: dict[str, Any] = {"use_cache": False}  # keys and values would be added to a cache twice
    if not getattr(layer, "_can_checkpoint_with_cache", False):
        given |= dict.fromkeys(("past_key_values", "layer_past"))
    kwargs |= {name: value for name, value in given.items() if name in kwargs}
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def default_call(module: nn.Module) -> Callable[[Any], Any]:
    """Return how to call a module with a batch: by its ``start_loss`` if it has one, else with what the batch holds."""
    if (own := getattr(module, "start_loss", None)) is not None:
        return own  # type: ignore[no-any-return]

    def call(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return module(**batch)
        return module(*batch) if isinstance(batch, (list, tuple)) else module(batch)

    return call


def counted_rows(batch: Any) -> Tensor | None:
    """Return which tokens of a batch count (rows, tokens): not its padding; None if there is no mask that tells.

    >>> counted_rows({"attention_mask": torch.tensor([[1, 1, 0]])})
    tensor([[ True,  True, False]])
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def tells_of(mask: Tensor, positions: torch.Size) -> bool:
    """Whether a mask of tokens is one of a layer's inputs: they have its shape, or are in one row of as many.

    >>> mask = torch.ones(2, 3)
    >>> [tells_of(mask, torch.Size(shape)) for shape in ([2, 3], [6], [3, 2], [5])]
    [True, True, False, False]
    """
    return positions in (mask.shape, (mask.numel(),))


def loss_of(result: Any) -> Tensor | None:
    """Return the loss in what a module returns: a scalar, or an entry ``loss``; None if there is none."""
    if isinstance(result, Mapping):
        result = result.get("loss")
    elif not isinstance(result, Tensor):
        result = getattr(result, "loss", None)
    return result if isinstance(result, Tensor) and result.ndim == 0 else None


def input_of(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return a layer's input, which is its first argument."""
    first = next(iter(inspect.signature(layer.forward).parameters)) if not args else ""
    x: Tensor = args[0] if args else kwargs[first]
    return x
