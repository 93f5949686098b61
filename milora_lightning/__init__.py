"""MiLoRA for PyTorch Lightning: adapters that start from the smallest singular triplets of each weight."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from milora_lightning.utils.notices import leave_out_kernels

if TYPE_CHECKING:
    from milora_lightning.adapters import LoRALinear as LoRALinear
    from milora_lightning.adapters import adapters_disabled as adapters_disabled
    from milora_lightning.adapters import adapters_merged as adapters_merged
    from milora_lightning.adapters import initialize as initialize
    from milora_lightning.adapters import inject as inject
    from milora_lightning.adapters import lora_layers as lora_layers
    from milora_lightning.callbacks import AdapterExport as AdapterExport
    from milora_lightning.callbacks import ChoiceMonitor as ChoiceMonitor
    from milora_lightning.callbacks import EvaluationSummary as EvaluationSummary
    from milora_lightning.callbacks import ForgettingMonitor as ForgettingMonitor
    from milora_lightning.callbacks import MiLoRAInit as MiLoRAInit
    from milora_lightning.callbacks import PredictionWriter as PredictionWriter
    from milora_lightning.callbacks import PrincipalProjection as PrincipalProjection
    from milora_lightning.callbacks import RandomState as RandomState
    from milora_lightning.callbacks import RunProgress as RunProgress
    from milora_lightning.callbacks import SubspaceMonitor as SubspaceMonitor
    from milora_lightning.callbacks import UpdateMonitor as UpdateMonitor
    from milora_lightning.checkpoint import CheckpointError as CheckpointError
    from milora_lightning.checkpoint import load_adapter as load_adapter
    from milora_lightning.config import LoRAConfig as LoRAConfig
    from milora_lightning.data import SFTDataModule as SFTDataModule
    from milora_lightning.export import export_merged as export_merged
    from milora_lightning.export import export_peft as export_peft
    from milora_lightning.export import initialize_peft as initialize_peft
    from milora_lightning.export import load_peft as load_peft
    from milora_lightning.inference import load_for_inference as load_for_inference
    from milora_lightning.linalg import singular_slice as singular_slice
    from milora_lightning.models import causal_attention as causal_attention
    from milora_lightning.module import CausalLMModule as CausalLMModule
    from milora_lightning.starts import register_start as register_start
    from milora_lightning.statistics import collect_statistics as collect_statistics
    from milora_lightning.strategies import MiLoRAFSDPStrategy as MiLoRAFSDPStrategy
    from milora_lightning.strategies import MiLoRAModelParallelStrategy as MiLoRAModelParallelStrategy
    from milora_lightning.utils import MiLoRAError as MiLoRAError

__version__ = "0.1.0"

# The public names by room. A room is imported when one of its names is first used: singular_slice needs torch and
# scipy, a callback Lightning and transformers, help neither. Type checkers read the imports above.
_OFFERED = {
    "adapters": ["LoRALinear", "adapters_disabled", "adapters_merged", "initialize", "inject", "lora_layers"],
    "callbacks": [
        "AdapterExport",
        "ChoiceMonitor",
        "EvaluationSummary",
        "ForgettingMonitor",
        "MiLoRAInit",
        "PredictionWriter",
        "PrincipalProjection",
        "RandomState",
        "RunProgress",
        "SubspaceMonitor",
        "UpdateMonitor",
    ],
    "checkpoint": ["CheckpointError", "load_adapter"],
    "config": ["LoRAConfig"],
    "data": ["SFTDataModule"],
    "export": ["export_merged", "export_peft", "initialize_peft", "load_peft"],
    "inference": ["load_for_inference"],
    "linalg": ["singular_slice"],
    "models": ["causal_attention"],
    "module": ["CausalLMModule"],
    "starts": ["register_start"],
    "statistics": ["collect_statistics"],
    "strategies": ["MiLoRAFSDPStrategy", "MiLoRAModelParallelStrategy"],
    "utils": ["MiLoRAError"],
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _OFFERED.items() for name in names}

__all__ = sorted(_HOMES)

leave_out_kernels()  # before PEFT is imported, which imports bitsandbytes


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
