"""What env shows for a bug report."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers.command_line import run

from milora_lightning.utils import machine


def test_it_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run("env")
    text = capsys.readouterr().out
    for name in ("milora-lightning", "torch", "lightning", "transformers", "peft"):
        assert f"  {name} " in text
    assert version("transformers") in text
    assert "eager, sdpa, causal_blocks" in text
    for name in ("cpu", "cores", "memory", "cache", "OMP_NUM_THREADS"):
        assert f"\n  {name} " in text
    assert "hf_secret" not in text
    found = re.search(r"memory +([\d.]+) GB \(([\d.]+) available\)", text)
    assert found is not None
    assert 0 < float(found[2]) <= float(found[1])


def test_as_json_with_all_packages(capsys: pytest.CaptureFixture[str]) -> None:
    run("env", "--as_json", "true", "--all_packages", "true")
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["pytest"] == version("pytest")
    assert set(report) == {"versions", "devices", "attention", "machine", "environment variables"}


def test_gpus_are_described(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n")
    monkeypatch.setattr(machine, "_DRIVER", driver)
    for name, value in {
        "is_available": True,
        "device_count": 2,
        "get_device_name": "NVIDIA H100",
        "get_device_capability": (9, 0),
        "mem_get_info": (70 * 10**9, 80 * 10**9),
        "nccl.version": (2, 29, 7),
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    run("env")
    text = capsys.readouterr().out
    assert "NVIDIA driver  550.54.14" in text
    assert text.count("NVIDIA H100, compute capability 9.0, 80.0 GB (70.0 free); fast products in float16, bf") == 2
    assert "2.29.7" in text
