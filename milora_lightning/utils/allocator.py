"""The C library's allocator of memory, as far as training on a CPU depends on it."""

from __future__ import annotations

import ctypes
import os

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of <malloc.h>
_LARGE = 2**20
_OTHERS = ("MALLOC_MMAP_", "MALLOC_TRIM_", "GLIBC_TUNABLES", "LD_PRELOAD")


def map_large_tensors() -> bool:
    """Have glibc map large tensors one by one, so that their memory returns to the system when they are freed.

    By default glibc puts them one after the other as soon as some have been freed, and the memory between those that
    stay cannot be used for larger ones. With gradient checkpointing, where each layer leaves its small input above all
    that it has computed, that doubles the memory: 12 layers took 415 MB, and take 239 MB so. It costs 0.5 to 2 % of
    the time of a step (both as docs/preview.md tells).

    Returns:
        Whether it is so now: not with other C libraries, nor where the environment chooses otherwise.
    """
    if not maps_large_tensors():
        return False
    return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE))


def maps_large_tensors() -> bool:
    """Whether :func:`map_large_tensors` does what it says in this environment.

    >>> isinstance(maps_large_tensors(), bool)
    True
    """
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    others = [name for name in os.environ if name.startswith(_OTHERS) and name != "MALLOC_MMAP_THRESHOLD_"]
    if others or (threshold is not None and not (threshold.isdigit() and int(threshold) <= _LARGE)):
        return False
    try:
        return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    except (OSError, TypeError):  # Windows
        return False
