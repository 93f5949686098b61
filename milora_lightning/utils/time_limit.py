"""A time limit for Python code of others."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeIsUp(BaseException):
    """The time is up. Not an ``Exception``, so that code that handles all of these does not go on."""


@contextmanager
def time_limit(seconds: float, every: float = 1) -> Iterator[None]:
    """Raise :class:`TimeIsUp` within this context after a time, and again until the context is left.

    Once is not enough: Python ignores what is raised while it runs a destructor, and the code would go on without a
    limit. There is none in threads other than the main one, and on systems without ``SIGALRM``.

    Args:
        seconds: The time.
        every: Seconds between later attempts.

    >>> try:
    ...     with time_limit(0.01):
    ...         while True:
    ...             pass
    ... except TimeIsUp:
    ...     print("too long")
    too long
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    within = True

    def end(number: int, frame: FrameType | None) -> None:
        if within:
            raise TimeIsUp

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, every)
    try:
        yield
    finally:
        within = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
