"""What the tests of layers share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora_lightning import LoRAConfig, LoRALinear, initialize, inject

OUT, IN, R, TOKENS = 24, 16, 4, 10


def adapted(
    init: str = "milora", dtype: torch.dtype = torch.float32, conv: bool = False, **options: float
) -> LoRALinear:
    """An adapter some training steps away from its start."""
    torch.manual_seed(0)
    base = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT)
    model = nn.Sequential(base.to(dtype))
    (layer,) = inject(model, LoRAConfig(r=R, lora_alpha=6, init=init, **options)).values()
    initialize(model)
    with torch.no_grad():
        layer.lora_A.add_(torch.randn(R, IN), alpha=0.1)
        layer.lora_B.add_(torch.randn(OUT, R), alpha=0.1)
    return layer


def plain(layer: LoRALinear, x: Tensor, mask: Tensor | None = None, keep: float = 1.0) -> Tensor:
    """The formula of the layer's documentation, written out."""
    delta = layer.lora_B @ layer.lora_A
    if layer.initial_A is not None:
        delta = delta - layer.initial_B @ layer.initial_A
    dropped = x if mask is None else x * mask / keep
    return layer.base_layer(x) + layer.scaling * F.linear(dropped, delta.to(x.dtype))


def relative_effects(layer: LoRALinear, x: Tensor) -> Tensor:
    """‖ΔW x‖ / ‖W x‖ of a linear layer's inputs, in float64."""
    x, delta, weight = (t.detach().double() for t in (x, layer.delta_weight(), layer.base_layer.weight))
    weight = weight.T if layer.transposed else weight
    return (x @ delta.T).norm(dim=-1) / (x @ weight.T).norm(dim=-1)
