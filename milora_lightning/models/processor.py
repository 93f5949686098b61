"""Fast dtypes of the processor, and warnings about CPU runs that are slow or unintended."""

from __future__ import annotations

import os
import platform
from typing import Literal

import torch
from torch import nn

from milora_lightning.utils.compat.torch import PRODUCTS_ON_X86
from milora_lightning.utils.counting import counted
from milora_lightning.utils.machine import cores, has_nvidia_gpu
from milora_lightning.utils.messages import inform, warn
from milora_lightning.utils.precision import dtype_of, name_of_dtype

DtypeName = Literal["auto", "fast", "float32", "bfloat16", "float16"]
"""Names of a model's dtype in options."""

CHOSEN = ("auto", "fast")
"""Names with which CPUs without instructions for the dtype keep the weights in float32."""

NUMBERS = "_numbers_dtype"
"""Attribute of a model kept in float32: the half-precision dtype that represents its weights exactly."""

INDEX, OLDEST_CUDA = "https://download.pytorch.org/whl", "cu126"
"""Package index of torch built for this CUDA version, for drivers from R560 on and older GPUs."""


def has_fast_products(dtype: torch.dtype) -> bool:
    """Return whether the processor has instructions for products in a dtype; True if torch does not know.

    >>> has_fast_products(torch.float32)
    True
    """
    if dtype not in PRODUCTS_ON_X86 or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    checks = [getattr(torch.cpu, name, None) for name in PRODUCTS_ON_X86[dtype]]
    return None in checks or any(check() for check in checks if check is not None)


def loaded_as(name: DtypeName) -> str:
    """Return the dtype to pass to ``from_pretrained`` for a named option.

    >>> loaded_as("fast"), loaded_as("float32")
    ('bfloat16', 'float32')
    """
    return "bfloat16" if name == "fast" else name


def held_as(name: DtypeName, in_files: torch.dtype | str | None, device: str) -> torch.dtype:
    """Return the dtype of a model's weights in memory.

    Args:
        name: The dtype option.
        in_files: The dtype of its files according to its configuration.
        device: The type of the device.
    """
    dtype = (in_files or torch.float32) if name == "auto" else loaded_as(name)
    dtype = dtype_of(dtype)
    return torch.float32 if name in CHOSEN and device == "cpu" and not has_fast_products(dtype) else dtype


def hold_in_float32(model: nn.Module, device: torch.device) -> None:
    """Convert a half-precision model to float32 if its CPU lacks instructions for its dtype, and tell the user.

    Each weight keeps its value, so this is still the model that other devices keep in half precision.

    Args:
        model: A model with a ``dtype``, not quantized; converted in place.
        device: The device that it computes on.
    """
    dtype = model.dtype
    if device.type != "cpu" or not isinstance(dtype, torch.dtype) or has_fast_products(dtype):
        return
    if all(p.dtype == dtype for p in model.parameters() if p.is_floating_point()):
        setattr(model, NUMBERS, dtype)
    model.float()
    name = name_of_dtype(dtype)
    inform(
        f"The {name} weights are held in float32, number by number the same: this processor has no instructions for "
        f"products in {name}, and would take many times as long."
    )


def warn_of_more_processes(processes: int) -> None:
    """Warn if more processes than there are cores share this machine's CPU."""
    available = cores()
    if processes > max(available, 1):
        warn(
            f"trainer.devices={processes} starts {processes} processes on a CPU with {counted(available, 'core')}, "
            "each with its own model, which is slower than trainer.devices=1 with all cores."
        )


def warn_of_unused_gpu() -> None:
    """Warn if torch cannot use an NVIDIA GPU that seems to be present and not hidden, with the reason and a remedy."""
    if (why := why_gpu_is_unused()) is not None:
        warn(
            "There seems to be an NVIDIA GPU here, but torch cannot use it, and everything runs on the CPU: "
            f"{why} To leave the GPU alone without this warning, set accelerator: cpu (--device cpu)."
        )


def why_gpu_is_unused() -> str | None:
    """Return why torch cannot use an NVIDIA GPU that seems to be present, and a remedy; None if all is well.

    The usual reasons are a CPU build of torch, or a build for a newer driver than the installed one: the newest torch
    on PyPI is built for the newest CUDA.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not has_nvidia_gpu() or torch.cuda.is_available():
        return None
    version = torch.__version__.partition("+")[0]
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build for CPUs. {_install(version)}"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if "driver" in reason and "too old" in reason:
            return f"{reason}, and torch {version} is built for CUDA {torch.version.cuda}. {_install(version)}"
        return f"{reason}."
    return "it finds none."


def _install(version: str) -> str:
    return (
        f"Install one for the driver: pip install torch=={version} --index-url {INDEX}/{OLDEST_CUDA} (or a newer CUDA "
        "that nvidia-smi names)."
    )


def warn_of_slow_products(
    dtype: torch.dtype, remedy: str = "set model.dtype: float32 (--model.dtype float32) to train on this CPU"
) -> None:
    """Warn if computing on the CPU in a dtype takes many times as long as in float32.

    Args:
        dtype: The dtype of the model.
        remedy: What to do, for the warning.
    """
    if not has_fast_products(dtype):
        name = name_of_dtype(dtype)
        warn(
            f"This processor has no instructions for products in {name}, so every step takes many times as long as in "
            f"float32: {remedy}."
        )
