"""Lightning callbacks."""

from milora_lightning.callbacks.choices import ChoiceMonitor
from milora_lightning.callbacks.export import AdapterExport
from milora_lightning.callbacks.forgetting import ForgettingMonitor
from milora_lightning.callbacks.interruption import SaveOnInterrupt
from milora_lightning.callbacks.milora_init import MiLoRAInit
from milora_lightning.callbacks.orthogonality import PrincipalProjection
from milora_lightning.callbacks.predictions import PredictionWriter
from milora_lightning.callbacks.progress import RunProgress
from milora_lightning.callbacks.random_state import RandomState
from milora_lightning.callbacks.subspace import SubspaceMonitor
from milora_lightning.callbacks.summary import EvaluationSummary
from milora_lightning.callbacks.update import UpdateMonitor

__all__ = [
    "AdapterExport",
    "ChoiceMonitor",
    "EvaluationSummary",
    "ForgettingMonitor",
    "MiLoRAInit",
    "PredictionWriter",
    "PrincipalProjection",
    "RandomState",
    "RunProgress",
    "SaveOnInterrupt",
    "SubspaceMonitor",
    "UpdateMonitor",
]
