"""Applying torch.compile to decoder layers, in training only."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from milora_lightning.models.pretrained import decoder_layers
from milora_lightning.utils.derived_class import Derived, derive

CODE = "_compiled_forward"
"""Attribute of a layer with its compiled forward; a copy of the layer must compile its own."""


def compile_layers(model: PreTrainedModel, device: torch.device | None = None) -> None:
    """Compile the forward of each decoder layer, used whenever gradients are computed.

    The layers share their code, so a few compiled variants serve all of them at every length. Evaluation runs
    uncompiled, as it has too many shapes to be worth compiling, especially in generation. Hooks stay outside of the
    compiled code, so layers may be sharded afterwards (FSDP2).

    Args:
        model: Any causal language model of transformers; modified in place.
        device: The device that it will train on. On CPUs, dropout draws the same masks as without compilation; on other
            devices it becomes part of the compiled code, which is faster and draws different masks.
    """
    on_cpu = device is None or device.type == "cpu"
    for layer in decoder_layers(model, "cannot be compiled: leave compile out"):
        layer.compile_options = {"fallback_random": True} if on_cpu else {}  # type: ignore[assignment]
        derive(layer, Compiled)
        layer.__dict__[CODE] = _compiled(layer)


class Compiled(Derived):
    """Mixin of a decoder layer that runs compiled code where gradients are computed."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        make, origin, state, *rest = super().__reduce_ex__(protocol)
        return (make, origin, {key: value for key, value in state.items() if key != CODE}, *rest)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer, by compiled code if gradients are computed."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if CODE not in self.__dict__:
            self.__dict__[CODE] = _compiled(self)
        return self.__dict__[CODE](*args, **kwargs)


def _compiled(layer: Any) -> Any:
    forward = super(Compiled, layer).forward
    return torch.compile(forward, options=layer.compile_options)
