"""How much memory is free."""

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
