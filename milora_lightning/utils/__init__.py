"""What all rooms may use: errors, messages, names and folders."""

from milora_lightning.utils.errors import MiLoRAError

__all__ = ["MiLoRAError"]
