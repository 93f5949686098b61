"""``env``: the environment of runs, for bug reports."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch

from milora_lightning.models.attention import NAME as CAUSAL_BLOCKS
from milora_lightning.models.processor import has_fast_products, why_gpu_is_unused
from milora_lightning.utils import process_memory
from milora_lightning.utils.folders import cache_folder
from milora_lightning.utils.machine import cores, nvidia_driver, processor

PACKAGES = (
    *("milora-lightning", "torch", "lightning", "transformers", "peft", "accelerate", "datasets", "tokenizers"),
    *("safetensors", "torchmetrics", "jsonargparse", "numpy", "scipy", "triton", "bitsandbytes", "torchao"),
    *("liger-kernel", "flash-attn", "trl", "deepspeed", "lm-eval"),
)
"""Packages that a run imports or may import."""

VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("TOKENIZERS_PARALLELISM", "MILORA_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "NCCL_DEBUG", "NCCL_P2P_DISABLE"),
    *("NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME", "WORLD_SIZE", "SLURM_NTASKS", "MALLOC_MMAP_MAX_"),
)
"""Environment variables that affect runs; none of them is secret."""

Section = dict[str, str]


def env(all_packages: bool = False, as_json: bool = False) -> None:
    """Show versions, devices and settings, for a bug report.

    Shows what a run would use on this machine: packages, GPUs and driver, fast dtypes, available attention
    implementations, memory, cores and environment variables. Nothing secret is shown.

    Args:
        all_packages: Whether to list all installed packages.
        as_json: Whether to print JSON instead of text.
    """
    report = environment(all_packages)
    print(json.dumps(report, indent=2) if as_json else as_text(report))


def environment(all_packages: bool = False) -> dict[str, Section]:
    """Return the contents of ``env`` by section."""
    return {
        "versions": _versions(all_packages),
        "devices": _devices(),
        "attention": _attention(),
        "machine": _machine(),
        "environment variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def as_text(report: dict[str, Section]) -> str:
    """Lay out sections as lines of name and value.

    >>> print(as_text({"machine": {"cores": "2"}, "environment variables": {}}))
    machine
      cores  2
    environment variables
      none
    """
    lines = []
    for title, entries in report.items():
        width = max(map(len, entries), default=0)
        lines += [title, *(f"  {name.ljust(width)}  {value}" for name, value in (entries or {"none": ""}).items())]
    return "\n".join(line.rstrip() for line in lines)


def _versions(all_packages: bool) -> Section:
    found: Section = {"python": f"{platform.python_version()} ({platform.python_implementation()})"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if commit := _commit():
        found["milora-lightning"] = f"{found.get('milora-lightning', 'not installed')}, commit {commit}"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    found["torch"] += f", built for {built if torch.version.cuda or torch.version.hip else 'CPUs'}"
    if all_packages:
        others = {each.metadata["Name"]: each.version for each in distributions() if each.metadata["Name"]}
        found |= {name: found.get(name, number) for name, number in sorted(others.items(), key=lambda x: x[0].lower())}
    return found


def _commit() -> str | None:
    """Return the commit of the running clone, with a + if files differ from it; None outside of a clone."""
    folder = Path(__file__).parents[3]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(folder)]
    hashed = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return f"{hashed.stdout.strip()}{'+' if changed.stdout.strip() else ''}" if hashed.returncode == 0 else None


def _devices() -> Section:
    found: Section = {}
    if driver := nvidia_driver():
        found["NVIDIA driver"] = driver
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found[f"cuda:{index}"] = _cuda_device(index)
    if torch.cuda.is_available() and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if torch.backends.mps.is_available():
        found["mps"] = "available (no float64: decompositions run on the CPU)"
    fast = [str(dtype)[6:] for dtype in (torch.float32, torch.bfloat16, torch.float16) if has_fast_products(dtype)]
    found["cpu"] = f"{processor()}; fast products in {', '.join(fast)}"
    if (why := why_gpu_is_unused()) is not None:
        found["unused GPU"] = why
    return found


def _cuda_device(index: int) -> str:
    name, major, minor = torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    lowest = {"bfloat16": (8, 0), "TF32": (8, 0), "float8": (8, 9)}
    dtypes = ["float16", *(dtype for dtype, least in lowest.items() if (major, minor) >= least)]
    return (
        f"{name}, compute capability {major}.{minor}, {total / 1e9:.1f} GB ({free / 1e9:.1f} free); fast products in "
        f"{', '.join(dtypes)}"
    )


def _attention() -> Section:
    installed = {
        "flash_attention_2": "flash_attn",
        "flash_attention_3": "flash_attn_interface",
        "flex_attention": "torch.nn.attention.flex_attention",
    }
    there = [name for name, module in installed.items() if importlib.util.find_spec(module) is not None]
    return {"available": ", ".join(["eager", "sdpa", CAUSAL_BLOCKS, *there])}


def _machine() -> Section:
    found: Section = {"system": platform.platform(), "cores": f"{cores()} (torch uses {torch.get_num_threads()})"}
    total, available = process_memory.total(), process_memory.available()
    if total is not None and available is not None:
        found["memory"] = f"{total / 1e9:.1f} GB ({available / 1e9:.1f} available)"
    folder: Any = cache_folder()
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    found["cache"] = f"{folder} ({shutil.disk_usage(there).free / 1e9:.0f} GB free)"
    found["program"] = sys.argv[0]
    return found
