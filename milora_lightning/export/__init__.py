"""Exports to folders for other tools, and imports of PEFT folders."""

from milora_lightning.export.folders import export_merged, export_peft
from milora_lightning.export.peft_import import load_peft
from milora_lightning.export.peft_start import initialize_peft

__all__ = ["export_merged", "export_peft", "initialize_peft", "load_peft"]
