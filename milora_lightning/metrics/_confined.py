"""Run by :mod:`milora_lightning.metrics.sandbox` as a script: executes a program under limits.

Standard input holds the program, the seconds and the bytes of memory as JSON. The exit status tells how the program
ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any

PASSED, FAILED, TOO_LONG = 77, 78, 79
USERS, PROCESSES, NETWORKS = 0x10000000, 0x20000000, 0x40000000  # flags of Linux's unshare
DIE_WITH_PARENT = 1
LARGEST_FILE = 2**24
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = ("os.", "socket.", "subprocess.", "pty.", "signal.pthread_kill", "webbrowser.", "ftplib.", "smtplib.")
ALLOWED = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv", "socket.__new__")
IN_FOLDER = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.")


def main() -> None:
    """Execute the program in a child process, and exit with its status."""
    task = json.load(sys.stdin)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    _isolate()
    child = os.fork()
    if child == 0:
        os._exit(_run(task["program"], task["seconds"], task["memory"]))
    deadline = time.monotonic() + task["seconds"]
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else FAILED)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os._exit(TOO_LONG)
        time.sleep(0.005)


def _isolate() -> None:
    """Cut off the network and give the child a separate process namespace, if the system allows it."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    if unshare is not None and unshare(USERS | PROCESSES | NETWORKS) != 0:
        unshare(PROCESSES | NETWORKS)  # root may do this even where nobody may create a user namespace


def _run(program: str, seconds: float, memory: int) -> int:
    import resource  # here, because this file is also imported on systems without such limits

    if hasattr(libc := ctypes.CDLL(None), "prctl"):
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (limit, limit))
    sys.dont_write_bytecode = True
    sys.addaudithook(_forbid)
    try:
        exec(compile(program, "<generated>", "exec"), {"__name__": "generated"})
    except BaseException:  # also SystemExit: a program that ends itself has not passed its tests
        return FAILED
    return PASSED


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what no solution needs: other processes, the network, and files outside its folder."""
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITING and not _inside(path):
            raise PermissionError(f"{path!r} cannot be written")
    elif event.startswith(IN_FOLDER):
        if not all(_inside(path) for path in arguments if isinstance(path, (str, bytes))):
            raise PermissionError(f"{event} is not allowed outside the folder of the program")
    elif event.startswith(FORBIDDEN) and event not in ALLOWED:
        raise PermissionError(f"{event} is not allowed")


def _inside(path: object) -> bool:
    if not isinstance(path, (str, bytes)):
        return False
    here, there = os.getcwd(), os.path.realpath(os.fsdecode(path))
    return there == os.devnull or there.startswith(here + os.sep)


if __name__ == "__main__":
    main()
