"""Training checkpoints: adapters and other trained weights, never the base model."""

from milora_lightning.checkpoint.adapter import load_adapter
from milora_lightning.checkpoint.io import CheckpointError

__all__ = ["CheckpointError", "load_adapter"]
