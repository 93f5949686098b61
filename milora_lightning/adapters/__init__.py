"""The method: which layers get adapters, what an adapter computes, and how its factors are initialized."""

from milora_lightning.adapters.contexts import adapters_disabled, adapters_merged
from milora_lightning.adapters.initialization import initialize
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.parts import TargetNotFoundError
from milora_lightning.adapters.surgery import inject

__all__ = [
    "LoRALinear",
    "TargetNotFoundError",
    "adapters_disabled",
    "adapters_merged",
    "initialize",
    "inject",
    "lora_layers",
]
