"""Lightning callbacks."""

from milora_lightning.callbacks.milora_init import MiLoRAInit
from milora_lightning.callbacks.predictions import PredictionWriter
from milora_lightning.callbacks.summary import EvaluationSummary

__all__ = ["EvaluationSummary", "MiLoRAInit", "PredictionWriter"]
