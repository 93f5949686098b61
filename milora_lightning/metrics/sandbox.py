"""Running generated programs in separate processes, with limits of time and memory.

This protects from accidents: endless loops, exhausted memory, files deleted or written elsewhere, other processes,
network access. It does not stop malicious programs: run what you do not trust in a container or virtual machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from milora_lightning.metrics._confined import PASSED
from milora_lightning.utils.errors import MissingPackageError

SCRIPT = Path(__file__).with_name("_confined.py")
STARTING = 60  # seconds for an interpreter to start on a busy machine


class Limits(NamedTuple):
    """Limits of a program.

    Attributes:
        seconds: Time limit.
        memory_gb: Address space in GB.
    """

    seconds: float = 10.0
    memory_gb: float = 4.0


def require_sandbox() -> None:
    """Check that programs can be confined on this system.

    Raises:
        ModuleNotFoundError: If they cannot, for example on Windows.
    """
    if importlib.util.find_spec("resource") is None or not hasattr(os, "fork"):
        raise MissingPackageError(
            "Generated programs are run with limits of Unix (the module resource), which this system does not have: "
            "score them on Linux or macOS, or write them by predict."
        )


def runs(program: str, limits: Limits = Limits()) -> bool:  # noqa: B008  (immutable)
    """Run a Python program to its end.

    Its standard input, output and error are empty; it sees none of this process's environment variables, can write only
    in an empty folder that is deleted afterwards, and cannot start processes or use the network.

    Args:
        program: The program's text.
        limits: Its limits.

    Returns:
        Whether it ended without an exception and within its limits.

    >>> runs("assert 1 + 1 == 2"), runs("assert 1 + 1 == 3"), runs("import sys; sys.exit(0)")
    (True, False, False)
    """
    task = {"program": program, "seconds": limits.seconds, "memory": int(limits.memory_gb * 2**30)}
    with tempfile.TemporaryDirectory(prefix="milora-program-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=os.path.realpath(folder),
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(task).encode(), timeout=limits.seconds + STARTING)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # together with anything it has left running
            process.wait()
    return process.returncode == PASSED
