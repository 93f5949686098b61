"""Gradients of the loss with respect to frozen weights, layer by layer, without storing them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from milora_lightning.adapters.candidates import base_of
from milora_lightning.adapters.linear_layers import linear_shape
from milora_lightning.linalg.single import full_precision
from milora_lightning.statistics.passes import Pass, arguments_of, loss_of, recomputing
from milora_lightning.utils.errors import InvalidInputError

SCALE = 2.0**10
"""Factor of the loss: gradients of outputs would vanish in float16. In other dtypes it changes no digit."""

Receive = Callable[[Tensor, Tensor], None]
"""Receives the gradient of a layer's output (..., out), and its input (..., in)."""


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward passes the gradient and the layer's input to a function."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, receive: Receive) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        return output.clone()  # a view could not be modified in place, as by ReLU(inplace=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.receive(grad, ctx.saved_tensors[0])
        return grad, None, None, None


def weight_gradients(layers: Mapping[str, nn.Module], over: Pass) -> dict[str, Tensor]:
    """Compute the mean, over the batches of all ranks, of the loss's gradients with respect to layers' weights.

    Autograd does not compute them: each layer's gradient is computed as g xᵀ from the gradient of its output, added to
    a sum in float32, and freed. Trainable parameters get no ``grad``.

    Args:
        layers: The layers.
        over: The pass; its calls return the loss.

    Returns:
        Gradients (out, in) by name, on the device of the pass.

    Raises:
        ValueError: If calls return no loss, or the loss does not depend on any of the layers.
    """
    sums = {name: torch.zeros(linear_shape(base_of(layer)), device=over.device) for name, layer in layers.items()}
    reached = dict.fromkeys(layers, False)
    counts = True

    def receive(name: str, grad: Tensor, x: Tensor) -> None:
        reached[name] = True
        if not counts:
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), full_precision():
            g, rows = grad.reshape(-1, grad.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
            sums[name].addmm_(g.mT, rows)

    anchor = torch.zeros((), device=over.device, requires_grad=True)
    with _tapping(layers, anchor, receive), recomputing(over.module):
        for batch, is_counted in over.run(gradients=True):
            counts = is_counted
            loss = loss_of(over.call_with(batch))
            if loss is None or not loss.requires_grad:
                raise InvalidInputError(
                    "This start takes gradients of a loss that depends on the adapted layers, and the module returns "
                    "none: give it a method start_loss(batch) that returns the loss of a batch as a scalar."
                )
            # Only towards the anchor: trainable parameters get no gradients, and DDP's hooks do not run.
            torch.autograd.grad(loss * SCALE, anchor, allow_unused=True)
    # After the sum: a layer that no batch of this rank reaches, such as an expert, may be reached on another.
    over.sum_over_ranks([*sums.values(), found := torch.tensor([*reached.values()], device=over.device).int()])
    if missing := [name for name, ranks in zip(layers, found.tolist(), strict=True) if not ranks]:
        raise InvalidInputError(
            f"The loss does not depend on layer {missing[0]!r} in these batches, which has no gradient to start from: "
            "leave it out (exclude_modules)."
        )
    return {name: total.div_(SCALE * len(over.batches)) for name, total in sums.items()}


@contextmanager
def _tapping(
    layers: Mapping[str, nn.Module], anchor: Tensor, receive: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
            x = arguments_of(layer, args, kwargs)[0]
            tapped: Tensor = _Tap.apply(output, anchor, x, lambda g, x: receive(name, g, x))  # type: ignore[no-untyped-call]
            return tapped

        return hook

    hooks = [layer.register_forward_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
