"""torch.compile for decoder layers, in training only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from milora_lightning.models.pretrained import decoder_layers


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the forward of each decoder layer, used whenever gradients are computed.

    The layers share their code, so a few compiled variants serve all of them at every length. Evaluation, and
    generation above all, has too many shapes to be worth compiling for, and runs uncompiled.

    Args:
        model: Any causal language model of transformers; modified in place.
    """
    for layer in decoder_layers(model):
        _compile(layer)


def _compile(layer: nn.Module) -> None:
    eager = layer.forward
    # Torch's own random numbers: dropout is cheaper with them, and gives the same results as without compilation.
    compiled = torch.compile(eager, options={"fallback_random": True})

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)

    layer.forward = forward
