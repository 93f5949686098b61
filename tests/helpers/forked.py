"""Runs a function in a process of its own that has imported everything already: half a second in place of ten."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def run_forked(function: Callable[[], object], folder: Path, limit: float = 240) -> int:
    """Run a function in a fork of this process, in a folder.

    What the function changes (patches, threads, signal handlers, the working directory) ends with the fork; what it
    writes to standard output and error is in ``output.txt``.

    Args:
        function: What to run; ``SystemExit`` gives the exit status, and any other exception 1.
        folder: The working directory.
        limit: Seconds after which the process is killed.

    Returns:
        The exit status; for a process that a signal has ended, its negative number.
    """
    return _wait([_fork(function, folder, "output.txt", {})], limit)[0]


def run_ranks(function: Callable[[], object], folder: Path, limit: float = 600) -> list[int]:
    """Run a function in two forks that know of each other what processes under torchrun know.

    What they write is in ``output0.txt`` and ``output1.txt``. As under torchrun, one that fails ends the other, which
    has some seconds to say why it cannot go on.

    Args:
        function: As in `run_forked`.
        folder: The working directory of both.
        limit: Seconds after which both are killed.

    Returns:
        Both exit statuses.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    ranks = [{**shared, "TORCHELASTIC_RUN_ID": "tests", "RANK": rank, "LOCAL_RANK": rank} for rank in range(2)]
    return _wait([_fork(function, folder, f"output{rank['RANK']}.txt", rank) for rank in ranks], limit)


def _fork(function: Callable[[], object], folder: Path, output: str, environment: dict[str, object]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(function, folder, output, environment)
    return pid


def _wait(pids: list[int], limit: float, grace: float = 20) -> list[int]:
    """Wait for all to end; kill those that still run at the limit, or some time after another one has failed."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + limit
    while len(statuses) < len(pids):
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid]:
                    end = min(end, time.monotonic() + grace)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[pid] for pid in pids]


def _child(function: Callable[[], object], folder: Path, output: str, environment: dict[str, object]) -> None:
    with the_end_of_the_process():
        if environment:
            # Of several runs, the collector would end a process group while the other rank waits in a later one, and
            # gloo has waited for ever then.
            gc.disable()
        torch.set_num_threads(1)  # a fork has none of its parent's other threads, and would wait for them
        os.environ.update({name: str(value) for name, value in environment.items()})
        os.chdir(folder)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1) for number in (1, 2))
        function()


@contextmanager
def the_end_of_the_process() -> Iterator[None]:
    """End a fork after what is done within, with the status and the words that a process of its own would end with."""
    status = 1
    # What the parent has left to its collector is not the fork's to free: the end of gloo's process group would join
    # threads that the fork does not have, which crashes it.
    gc.freeze()
    try:
        yield
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
