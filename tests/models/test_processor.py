"""What a user hears of a dtype that the processor does not multiply."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from milora_lightning.models.processor import warn_of_more_processes, warn_of_slow_products, warn_of_unused_gpu
from milora_lightning.utils import machine
from milora_lightning.utils.compat.torch import PRODUCTS_ON_X86


@pytest.mark.parametrize("has", [False, True])
def test_slow_products_are_told_and_fast_ones_are_not(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in PRODUCTS_ON_X86[torch.bfloat16]:
        monkeypatch.setattr(torch.cpu, name, lambda: has, raising=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_slow_products(torch.bfloat16)
        warn_of_slow_products(torch.float32)
    assert [("bfloat16" in str(w.message), "--model.dtype float32" in str(w.message)) for w in said] == (
        [] if has else [(True, True)]
    )


def test_other_processors_are_not_judged(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    warn_of_slow_products(torch.bfloat16)
    assert not recwarn


def test_more_processes_than_cores_are_told(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    warn_of_more_processes(2)
    assert not recwarn
    warn_of_more_processes(4)
    assert "starts 4 processes on a CPU with 2 cores" in str(recwarn.pop().message)


def said_of_gpu(there: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> list[str]:
    monkeypatch.setattr(machine, "_DRIVER", Path("/no/such/file"))
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi" if there else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    warn_of_unused_gpu()
    return [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize(("there", "hidden"), [(True, None), (True, ""), (False, None)])
def test_a_gpu_that_torch_cannot_use_is_told_with_the_reason(
    there: bool, hidden: str | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def fails() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 1).\nUpdate it.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fails)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    said = said_of_gpu(there, monkeypatch, recwarn)
    assert len(said) == (there and hidden is None)
    for text in said:
        assert "everything runs on the CPU: The NVIDIA driver on your system is too old (found" in text
        assert "is built for CUDA 13.0. Install one for the driver: pip install torch==" in text


def test_a_build_for_cpus_beside_a_gpu_is_told_with_the_command(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (text,) = said_of_gpu(True, monkeypatch, recwarn)
    assert "is a build for CPUs. Install one for the driver: pip install torch==" in text
    assert "--index-url https://download.pytorch.org/whl/cu126" in text
