"""The kinds of adapters: which class fits a layer, and which module replaces the layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from milora_lightning.adapters.attention import adapt_attention
from milora_lightning.adapters.convolution import LoRAConv
from milora_lightning.adapters.embedding import LoRAEmbedding
from milora_lightning.adapters.experts import LoRAExperts, is_stack, wrappers_of
from milora_lightning.adapters.held_weight import HeldWeight
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import linear_shape
from milora_lightning.adapters.packed import LoRAPacked, is_packed
from milora_lightning.config import LoRAConfig

KINDS: tuple[type[LoRALinear], ...] = (LoRALinear, LoRAConv, LoRAEmbedding, LoRAExperts, LoRAPacked)


def adapter_class(layer: nn.Module) -> type[LoRALinear]:
    """Return the class of the adapter that fits a layer.

    >>> adapter_class(nn.Linear(2, 2)).__name__, adapter_class(nn.Conv1d(2, 2, 1)).__name__
    ('LoRALinear', 'LoRAConv')
    """
    return next((kind for kind in KINDS if kind.fits(layer)), LoRALinear)


def adapter_for(layer: nn.Module, name: str, config: LoRAConfig) -> LoRALinear:
    """Create the adapter of a layer.

    Args:
        layer: The layer.
        name: Its name in the model, for ranks and scales by name.
        config: The configuration.
    """
    options = config.lora_dropout, config.init, config.dropout_on, config.parts(name, linear_shape(layer)[0])
    adapter = adapter_class(layer)(layer, config.rank(name), config.alpha(name), *options)
    return adapter.train(layer.training)


def replacements(module: nn.Module, adapters: Mapping[nn.Module, LoRALinear]) -> dict[nn.Module, nn.Module]:
    """Map modules to their replacements: a layer to its adapter, experts to a wrapper with their adapters.

    Attention modules are not replaced; they get their adapters here.

    Args:
        module: The model. Experts that have some adapters already get the new ones, too.
        adapters: The new adapters by their base layers.
    """
    stacks = {layer: adapter for layer, adapter in adapters.items() if is_stack(layer)}
    adapt_attention({layer: adapter for layer, adapter in adapters.items() if is_packed(layer)})
    layers = {layer: adapter for layer, adapter in adapters.items() if not isinstance(layer, HeldWeight)}
    return {**layers, **wrappers_of(module, stacks)}
