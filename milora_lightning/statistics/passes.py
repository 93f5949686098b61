"""Passes over batches: how a module is called, and which batches a rank runs."""

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
from milora_lightning.parallel.gathering import free_gathered
from milora_lightning.parallel.work import in_step
from milora_lightning.utils.modes import eval_mode

Track = Callable[[Sequence[int]], Iterable[int]]
"""Wraps the iteration over the batches' indices in a pass, to show progress."""


@dataclass(frozen=True)
class Pass:
    """A pass of a module over batches.

    Attributes:
        module: The module. During the pass, adapters are disabled and it is in eval mode.
        batches: All batches, the same on each rank, which runs every ``size``-th of them.
        call: Calls the module with a batch on its device, and returns the loss if gradients are needed.
        place: Moves a batch to the device.
        device: Device of the sums.
        number: Index of this rank's share of the batches.
        size: Number of shares. With more than one, sums are over all ranks of torch's default process group.
        context: Creates a context for calls, such as autocast's.
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
        """Yield each of this rank's batches, on the device, and whether it counts; the caller must run it."""
        with torch.set_grad_enabled(gradients), self._prepared():
            for batch, counts in in_step(self.batches, self.number, self.size, self.track):
                yield self.place(batch), counts

    def first(self) -> None:
        """Run only the first batch."""
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
        # Compiled code ignores hooks that are added and removed.
        with adapters_disabled(self.module), eval_mode(self.module), torch.compiler.set_stance("force_eager"):
            try:
                yield
            finally:
                free_gathered(self.module)


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
        for layer, forward in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            if forward is not None:
                layer.forward = forward


def _recomputed(layer: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given: dict[str, Any] = {"use_cache": False}  # keys and values would be added to a cache twice
    if not getattr(layer, "_can_checkpoint_with_cache", False):
        given |= dict.fromkeys(("past_key_values", "layer_past"))
    kwargs |= {name: value for name, value in given.items() if name in kwargs}
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def default_call(module: nn.Module) -> Callable[[Any], Any]:
    """Return a function that calls a module with a batch: its ``start_loss`` if it exists, otherwise the module."""
    if (start_loss := getattr(module, "start_loss", None)) is not None:
        return start_loss  # type: ignore[no-any-return]

    def call(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return module(**batch)
        return module(*batch) if isinstance(batch, (list, tuple)) else module(batch)

    return call


def counted_rows(batch: Any) -> Tensor | None:
    """Return which tokens of a batch count, i.e. are not padding, (rows, tokens); None if the batch has no mask.

    >>> counted_rows({"attention_mask": torch.tensor([[1, 1, 0]])})
    tensor([[ True,  True, False]])
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def tells_of(mask: Tensor, positions: torch.Size) -> bool:
    """Whether a mask of tokens fits a layer's inputs: these have its shape, or are in one row of the same length.

    Args:
        mask: A mask of tokens.
        positions: Shape of the inputs without the features.

    >>> mask = torch.ones(2, 3)
    >>> [tells_of(mask, torch.Size(shape)) for shape in ([2, 3], [6], [3, 2], [5])]
    [True, True, False, False]
    """
    return positions in (mask.shape, (mask.numel(),))


def loss_of(result: Any) -> Tensor | None:
    """Return the loss in a module's result, which is a scalar or has an entry ``loss``; None if there is none."""
    if isinstance(result, Mapping):
        result = result.get("loss")
    elif not isinstance(result, Tensor):
        result = getattr(result, "loss", None)
    return result if isinstance(result, Tensor) and result.ndim == 0 else None


def arguments_of(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call of a layer in the order of its parameters; the first one is its input.

    >>> arguments_of(nn.Linear(2, 2), (), {"input": 1}), arguments_of(nn.Linear(2, 2), (1,), {})
    ((1,), (1,))
    """
    return inspect.signature(layer.forward).bind(*args, **kwargs).args if kwargs else args
