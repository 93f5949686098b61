"""How much memory is free."""

from __future__ import annotations

import torch


def available(kind: str) -> int | None:
    """Return the memory available on a device in bytes; None if it is not known.

    Args:
        kind: Type of the device, such as ``"cuda"``.
    """
    if kind == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch gives it to whoever asks next
        return torch.cuda.mem_get_info()[0] + kept
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
