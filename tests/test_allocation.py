"""Memory kept between steps, counted in the page faults that making it anew would cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import lightning.pytorch, torch  # as where it is used: the heap has to have grown beyond what torch alone takes
from milora_lightning.allocation import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def fill():
    torch.ones(64 * 2**20)  # 256 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):  # small objects settle between the first ones
    before = fill()
print((fill() - before) / (64 * 2**20 * 4 / resource.getpagesize()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("how", "least", "most"), [("kept", 0.0, 0.01), ("returned", 0.9, 1.1)])
def test_freed_memory_is_used_again(how: str, least: float, most: float) -> None:
    """As a share of a tensor's pages; a process of its own, as the setting cannot be taken back."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    assert least <= float(done.stdout) <= most
