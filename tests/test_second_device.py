"""Whole runs on a device that is not the CPU: nothing is mixed, nothing waits, nothing launches more than it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

TESTS = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch cannot register a device in Python",
)
def test_runs_on_a_second_device() -> None:
    """In a process of its own, because torch would take the device for the accelerator of all other tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / "second_device.py")]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
