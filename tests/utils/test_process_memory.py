"""The memory of processes and containers, as the system reports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from milora_lightning.utils import process_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="what a process has is read from Linux's /proc")


@linux
def test_a_process_does_not_report_the_peak_of_the_one_that_started_it() -> None:
    large = torch.ones(2**26)  # 256 MiB
    file = process_memory.__file__
    program = f"import runpy; print(runpy.run_path({file!r})['peak_resident']())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = process_memory.peak_resident()
    assert here is not None
    assert here >= large.nbytes
    assert int(done.stdout) < large.nbytes / 2


@linux
def test_the_peak_outlives_what_is_freed() -> None:
    torch.ones(2**25)
    resident, peak = process_memory.resident(), process_memory.peak_resident()
    assert resident is not None
    assert peak is not None
    assert 0 < resident < peak


@pytest.mark.parametrize(
    ("limit", "expected"), [("3000000", 1_500_000), ("max", 10_240_000), ("99999999999", 10_240_000)]
)
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    contents = {
        "meminfo": "MemTotal:  20000 kB\nMemAvailable:  10000 kB\n",
        "max": f"{limit}\n",
        "current": "2000000\n",
        "stat": "anon 1500000\ninactive_file 500000\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(process_memory, "_MEMINFO", tmp_path / "meminfo")
    files = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    monkeypatch.setattr(process_memory, "_LIMITS", (("/none", "/none", "/none"), files))
    assert process_memory.available() == expected


def test_what_is_not_reported_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_STATUS", "_MEMINFO"):
        monkeypatch.setattr(process_memory, name, tmp_path / "none")
    monkeypatch.setattr(process_memory, "_LIMITS", ())
    monkeypatch.setattr(process_memory, "resource", None)
    assert process_memory.resident() is None
    assert process_memory.peak_resident() is None
    assert process_memory.available() is None
