"""Running of generated programs in a process of their own, with limits of time and memory.

This guards against accidents: endless loops, all of memory, files deleted or written elsewhere, other processes, the
network. It is no prison for a program that means harm. Run what you do not trust in a container or virtual machine.
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
STARTING = 60  # seconds in which an interpreter must have started, on a busy machine


class Limits(NamedTuple):
    """What a program may use.

    Attributes:
        seconds: Time until it is ended.
        memory_gb: Address space.
    """

    seconds: float = 10.0
    memory_gb: float = 4.0


def require_sandbox() -> None:
    """Check that programs can be confined on this system.

    Raises:
        ModuleNotFoundError: If they cannot, as on Windows.
    """
    if importlib.util.find_spec("resource") is None or not hasattr(os, "fork"):
        raise MissingPackageError(
            "Generated programs are run with limits of Unix (the module resource), which this system does not have: "
            "score them on Linux or macOS, or write them by predict."
        )


def runs(program: str, limits: Limits = Limits()) -> bool:  # noqa: B008  (immutable)
    """Run a Python program to its end.

    Its standard input, output and error are empty; it sees none of this process's environment variables, may write
    only in an empty folder that is deleted afterwards, start no processes, and use no network.

    Args:
        program: The program's text.
        limits: What it may use.

    Returns:
        Whether it came to its end without an exception and within its limits.

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
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has left running
            process.wait()
    return process.returncode == PASSED
