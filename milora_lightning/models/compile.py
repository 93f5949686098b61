"""Decoder layers under torch.compile, where it pays: in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from milora_lightning.models.pretrained import decoder_layers


def compile_layers(model: PreTrainedModel) -> None:
    """Have torch.compile compile each decoder layer's forward, when gradients are computed.

    The layers share the code: few variants serve all of them and every length. Evaluation, generation above all,
    meets too many shapes for the time that each compilation takes, and goes on as before.

    Args:
        model: Any causal language model of transformers; changed in place.
    """
    for layer in decoder_layers(model):
        _compile(layer)


def _compile(layer: nn.Module) -> None:
    plain = layer.forward
    # With torch's own random numbers: dropout's are cheaper than the compiler's, and the same as without compilation.
    compiled = torch.compile(plain, options={"fallback_random": True})

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    layer.forward = forward
