"""Where factors start: directions and singular values, the methods that have names, and a registry for one's own."""

from milora_lightning.starts.registry import Start, find_start, register_start
from milora_lightning.starts.statistics import Statistics

__all__ = ["Start", "Statistics", "find_start", "register_start"]
