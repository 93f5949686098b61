"""What the package offers to import; ``milora_lightning`` itself loads this when the first of it is asked for."""

from milora_lightning.attention import causal_attention
from milora_lightning.callbacks import (
    AdapterExport,
    EvaluationSummary,
    ForgettingMonitor,
    MiLoRAInit,
    PredictionWriter,
    PrincipalProjection,
    RandomState,
    RunProgress,
    SubspaceMonitor,
)
from milora_lightning.checkpoint import load_adapter
from milora_lightning.checkpoint_io import CheckpointError
from milora_lightning.config import LoRAConfig
from milora_lightning.data import SFTDataModule
from milora_lightning.decomposition import singular_slice
from milora_lightning.export import export_merged, export_peft
from milora_lightning.inference import load_for_inference
from milora_lightning.initialization import initialize
from milora_lightning.lora import LoRALinear
from milora_lightning.module import CausalLMModule
from milora_lightning.peft_import import load_peft
from milora_lightning.strategies import MiLoRAFSDPStrategy, MiLoRAModelParallelStrategy
from milora_lightning.surgery import adapters_disabled, adapters_merged, inject, lora_layers

__all__ = [
    "AdapterExport",
    "CausalLMModule",
    "CheckpointError",
    "EvaluationSummary",
    "ForgettingMonitor",
    "LoRAConfig",
    "LoRALinear",
    "MiLoRAFSDPStrategy",
    "MiLoRAInit",
    "MiLoRAModelParallelStrategy",
    "PredictionWriter",
    "PrincipalProjection",
    "RandomState",
    "RunProgress",
    "SFTDataModule",
    "SubspaceMonitor",
    "adapters_disabled",
    "adapters_merged",
    "causal_attention",
    "export_merged",
    "export_peft",
    "initialize",
    "inject",
    "load_adapter",
    "load_for_inference",
    "load_peft",
    "lora_layers",
    "singular_slice",
]
