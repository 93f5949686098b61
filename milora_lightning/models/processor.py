"""What the processor computes fast, and warnings about CPU runs that are slow or not intended."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import torch

from milora_lightning.utils.compat import PRODUCTS_ON_X86
from milora_lightning.utils.counting import counted
from milora_lightning.utils.messages import warn


def has_fast_products(dtype: torch.dtype) -> bool:
    """Tell whether the processor has instructions for products in a dtype; True where torch cannot tell.

    >>> has_fast_products(torch.float32)
    True
    """
    if dtype not in PRODUCTS_ON_X86 or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    checks = [getattr(torch.cpu, name, None) for name in PRODUCTS_ON_X86[dtype]]
    return None in checks or any(check() for check in checks if check is not None)


def warn_of_more_processes(processes: int) -> None:
    """Warn if more processes than there are cores share this machine's CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes > max(cores, 1):
        warn(
            f"trainer.devices={processes} starts {processes} processes on a CPU with {counted(cores, 'core')}, each "
            "with its own model, which is slower than trainer.devices=1 with all cores."
        )


def warn_of_unused_gpu() -> None:
    """Warn if an NVIDIA GPU seems to be present and is not hidden, but torch cannot use it; say why."""
    present = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if present and not torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        warn(
            "There seems to be an NVIDIA GPU here, but torch cannot use it, and everything runs on the CPU: "
            f"{_reason()}. To leave the GPU alone without this warning, set accelerator: cpu (--device cpu)."
        )


def _reason() -> str:
    """Return why torch cannot use a GPU."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return "it finds none"


def warn_of_slow_products(dtype: torch.dtype) -> None:
    """Warn if training on the CPU in a dtype takes many times as long as in float32."""
    if not has_fast_products(dtype):
        name = str(dtype).removeprefix("torch.")
        warn(
            f"This processor has no instructions for products in {name}, so a step takes many times as long as in "
            "float32: set model.dtype: float32 (--model.dtype float32) to train on this CPU."
        )
