"""Checkpoints of training: adapters and what else was trained, never the base."""

from milora_lightning.checkpoint.adapter import load_adapter
from milora_lightning.checkpoint.io import CheckpointError

__all__ = ["CheckpointError", "load_adapter"]
