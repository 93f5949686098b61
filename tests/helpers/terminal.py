"""A terminal for tests: runs a function before a pseudo-terminal, and reads what a person would see there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pyte

from helpers.forked import the_end_of_the_process


@dataclass
class Recording:
    """What was on the screen.

    Attributes:
        screens: The time in seconds since the beginning, and the lines, several times a second.
        raw: All that was written, control characters included.
        status: Exit status of the process.
    """

    screens: list[tuple[float, list[str]]] = field(default_factory=list)
    raw: str = ""
    status: int = 0

    @property
    def last(self) -> str:
        """What stays on the screen."""
        return "\n".join(self.screens[-1][1])


def run_in_terminal(
    function: Callable[[], object],
    columns: int,
    rows: int = 24,
    keys: Callable[[str], bytes | None] | None = None,
    limit: float = 120,
) -> Recording:
    """Run a function in a process of its own, with all that is imported already, before a terminal.

    Args:
        function: What to run; SystemExit gives the exit status.
        columns: Width of the terminal.
        rows: Its height.
        keys: Given the screen, which keys to press now, if any.
        limit: Seconds after which the process is killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid, terminal = pty.fork()
    if pid == 0:
        _child(function, columns, rows)
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    recording, raw, started = Recording(), b"", time.monotonic()
    while True:
        ready, _, _ = select.select([terminal], [], [], 0.1)
        data = b""
        if ready:
            with contextlib.suppress(OSError):  # which is how the end shows
                data = os.read(terminal, 65536)
            if not data:
                break
            raw += data
            stream.feed(data)
        now = time.monotonic() - started
        if not recording.screens or now - recording.screens[-1][0] >= 0.2:
            recording.screens.append((now, list(screen.display)))
            pressed = keys("\n".join(screen.display)) if keys is not None else None
            if pressed:
                os.write(terminal, pressed)
        if now > limit:
            os.kill(pid, signal.SIGKILL)
    recording.screens.append((time.monotonic() - started, list(screen.display)))
    recording.raw = raw.decode(errors="replace")
    recording.status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return recording


def _child(function: Callable[[], object], columns: int, rows: int) -> None:
    with the_end_of_the_process():
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            os.environ.pop(name, None)
        os.environ["TERM"] = "xterm-256color"
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        import rich

        rich.reconfigure()
        function()
