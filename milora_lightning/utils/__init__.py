"""Shared utilities: errors, messages, names, folders, and private APIs of other packages."""

from milora_lightning.utils.errors import MiLoRAError

__all__ = ["MiLoRAError"]
