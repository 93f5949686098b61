"""Available memory, and releasing memory that torch caches."""

from __future__ import annotations

import torch

from milora_lightning.utils import process_memory


def available(kind: str) -> int | None:
    """Return the memory available on a device in bytes; None if it is not known.

    Args:
        kind: Type of the device, such as ``"cuda"``.
    """
    if kind == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # cached by torch for the next tensors
        return torch.cuda.mem_get_info()[0] + kept
    return process_memory.available()


def return_memory(device: torch.device) -> None:
    """Release a device's memory that torch caches for later tensors: it may be too fragmented for the next ones."""
    if device.type != "cpu" and hasattr(module := torch.get_device_module(device), "empty_cache"):
        module.empty_cache()
