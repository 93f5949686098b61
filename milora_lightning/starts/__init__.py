"""Initial values of the factors: directions and singular values, named methods, and a registry for custom starts."""

from milora_lightning.starts.registry import Start, find_start, register_start
from milora_lightning.starts.statistics import Statistics

__all__ = ["Start", "Statistics", "find_start", "register_start"]
