"""MiLoRA for PyTorch Lightning: adapters that start from the smallest singular triplets of each weight."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from milora_lightning.notices import leave_out_kernels

if TYPE_CHECKING:
    from milora_lightning.api import *  # noqa: F403

__version__ = "0.1.0"

leave_out_kernels()  # before PEFT is imported, which imports bitsandbytes


def __getattr__(name: str) -> Any:
    # All that is offered stands in milora_lightning.api. It takes torch and Lightning, ten seconds to import, which the
    # help of the command line does without.
    if name == "__all__" or not name.startswith("_"):
        return getattr(importlib.import_module("milora_lightning.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
