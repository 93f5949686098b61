"""How much memory is free, and freeing what torch keeps."""

from __future__ import annotations

import torch

from milora_lightning.utils import process_memory


def available(kind: str) -> int | None:
    """Return the memory available on a device in bytes; None if it is not known.

    Args:
        kind: Type of the device, such as ``"cuda"``.
    """
    if kind == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch gives it to whoever asks next
        return torch.cuda.mem_get_info()[0] + kept
    return process_memory.available()


def return_memory(device: torch.device) -> None:
    """Give back the memory of a device that torch keeps for later tensors: its pieces may not fit what comes next."""
    if device.type != "cpu" and hasattr(module := torch.get_device_module(device), "empty_cache"):
        module.empty_cache()
