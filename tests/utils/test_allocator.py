"""Memory that layers leave between what they keep, by glibc's default and when large tensors are mapped one by one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from milora_lightning.utils.allocator import maps_large_tensors

# As with gradient checkpointing: a layer keeps little, above what it has computed, where the next layer's never fits.
PROGRAM = """
import os, torch
from milora_lightning.utils.allocator import map_large_tensors
from milora_lightning.utils.process_memory import peak_resident, resident
for mapped in (False, True):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    if mapped:
        assert map_large_tensors()
    torch.ones(2**22)  # freed at once: from here on glibc's default maps no tensor of this size
    before, kept = resident(), []
    for layer in range(24):
        computed = torch.ones(2**20 + 2**12 * layer)
        kept.append(torch.ones(2**19))
        del computed
    print((peak_resident() - before) / 2**20, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux" or not maps_large_tensors(), reason="glibc's allocator")
def test_memory_returns_that_glibc_would_lose() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    by_default, mapped = map(float, done.stdout.split())
    needed = 24 * 2 + 4.4  # MiB: what is kept, and what the last layer computes
    assert mapped < 1.15 * needed
    assert by_default > 1.5 * needed


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "67108864"}, False),
        ({"MALLOC_MMAP_MAX_": "0"}, False),
        ({"MALLOC_ARENA_MAX": "2"}, True),
        ({"LD_PRELOAD": "libjemalloc.so"}, False),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_the_environment_chooses_stays(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool
) -> None:
    if not hasattr(__import__("ctypes").CDLL(None), "gnu_get_libc_version"):
        pytest.skip("another C library")
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert maps_large_tensors() == expected
