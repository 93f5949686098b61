"""Lightning's strategies, extended for adapters."""

from milora_lightning.strategies.fsdp import MiLoRAFSDPStrategy
from milora_lightning.strategies.model_parallel import MiLoRAModelParallelStrategy

__all__ = ["MiLoRAFSDPStrategy", "MiLoRAModelParallelStrategy"]
