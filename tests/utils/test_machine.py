"""What is known of the machine and its memory, on machines that are imitated."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from milora_lightning.utils import machine, memory, process_memory


def test_the_drivers_version_is_the_first_with_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    assert machine.nvidia_driver() is None
    for kind in ("Kernel Module  550.54.14  Thu Feb 22", "Open Kernel Module for x86_64  550.54.14  Release"):
        (tmp_path / "version").write_text(f"NVRM version: NVIDIA UNIX x86_64 {kind}\nGCC version:  gcc 12.3.0\n")
        assert machine.nvidia_driver() == "550.54.14"
        assert machine.has_nvidia_gpu()
    (tmp_path / "version").write_text("no number")
    assert machine.nvidia_driver() is None


def test_a_gpu_is_seen_by_its_program_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    if not Path("/dev/nvidia0").exists():
        assert not machine.has_nvidia_gpu()
    (tmp_path / "nvidia-smi").touch(0o755)
    assert machine.has_nvidia_gpu()


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5} if pid == 0 else set(), raising=False)
    assert machine.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert machine.cores() == 7


def test_the_processors_name_is_known_without_proc_too(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nmodel name\t: Some CPU 9\nflags\t: a\nprocessor\t: 1\nmodel name\t: Some CPU 9\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert machine.processor() == "Some CPU 9"

    def fails(self: Path, **_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fails)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert machine.processor() == "arm64"


def test_memory_that_torch_keeps_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes: what the device has free, and what torch has reserved there and uses for nothing."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 8000))
    assert memory.available("cuda") == 1030
    monkeypatch.setattr(process_memory, "available", lambda: 77)
    assert memory.available("cpu") == 77


def test_memory_is_returned_where_a_device_keeps_any(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    modules: dict[str, Any] = {
        "xpu": SimpleNamespace(empty_cache=lambda: emptied.append("xpu")),
        "hpu": SimpleNamespace(),
        "cpu": SimpleNamespace(empty_cache=lambda: emptied.append("cpu")),
    }
    monkeypatch.setattr(torch, "get_device_module", lambda device: modules[device.type])
    for kind in modules:
        memory.return_memory(torch.device(kind))
    assert emptied == ["xpu"]
