"""Memory kept between steps, counted in the page faults that making it anew would cost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource
import lightning.pytorch, torch  # as where it is used: the heap has to have grown beyond what torch alone takes
def fill():
    torch.ones(64 * 2**20)  # 256 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):  # small objects settle between the first ones
    before = fill()
print((fill() - before) / (64 * 2**20 * 4 / resource.getpagesize()))
"""
MAKEFILE = Path(__file__).parents[2] / "Makefile"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("how", "least", "most"), [("kept", 0.0, 0.01), ("returned", 0.9, 1.1)])
def test_freed_memory_is_used_again_by_make_fit(how: str, least: float, most: float) -> None:
    """As a share of a tensor's pages."""
    variables = dict(re.findall(r"(MALLOC_\w+_)=(\d+)", MAKEFILE.read_text())) if how == "kept" else {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert least <= float(done.stdout) <= most
