"""MiLoRA for PyTorch Lightning: adapters that start from the smallest singular triplets of each weight."""

from milora_lightning.callbacks import EvaluationSummary, MiLoRAInit, PredictionWriter
from milora_lightning.checkpoint import CheckpointError, load_adapter
from milora_lightning.config import LoRAConfig
from milora_lightning.data import SFTDataModule
from milora_lightning.decomposition import singular_slice
from milora_lightning.lora import LoRALinear
from milora_lightning.module import CausalLMModule
from milora_lightning.surgery import adapters_disabled, initialize, inject, lora_layers

__version__ = "0.1.0"

__all__ = [
    "CausalLMModule",
    "CheckpointError",
    "EvaluationSummary",
    "LoRAConfig",
    "LoRALinear",
    "MiLoRAInit",
    "PredictionWriter",
    "SFTDataModule",
    "adapters_disabled",
    "initialize",
    "inject",
    "load_adapter",
    "lora_layers",
    "singular_slice",
]
