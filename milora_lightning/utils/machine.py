"""The machine: processor, NVIDIA GPU and driver."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/version")


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the processor's name.

    >>> bool(processor())
    True
    """
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def has_nvidia_gpu() -> bool:
    """Whether this machine seems to have an NVIDIA GPU, even if torch cannot use it."""
    return _DRIVER.exists() or Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def nvidia_driver() -> str | None:
    """Return the version of NVIDIA's kernel driver, or None if there is none.

    It is the file's first number with dots: ``NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  ...``
    """
    try:
        found = re.search(r"\b\d{3,}(\.\d+)+", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[0] if found else None
