"""Which class of adapter a layer gets."""

from __future__ import annotations

from torch import nn

from milora_lightning.adapters.convolution import LoRAConv
from milora_lightning.adapters.embedding import LoRAEmbedding
from milora_lightning.adapters.experts import LoRAExperts
from milora_lightning.adapters.layer import LoRALinear

KINDS: tuple[type[LoRALinear], ...] = (LoRALinear, LoRAConv, LoRAEmbedding, LoRAExperts)


def adapter_class(layer: nn.Module) -> type[LoRALinear]:
    """Return the class of the adapter that fits a layer.

    >>> adapter_class(nn.Linear(2, 2)).__name__, adapter_class(nn.Conv1d(2, 2, 1)).__name__
    ('LoRALinear', 'LoRAConv')
    """
    return next((kind for kind in KINDS if kind.fits(layer)), LoRALinear)
