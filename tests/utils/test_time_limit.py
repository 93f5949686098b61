"""Time limits, also where Python ignores what is raised."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from milora_lightning.utils.time_limit import TimeIsUp, time_limit


class Slow:
    def __del__(self) -> None:
        time.sleep(0.3)


def loop(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def ignore_the_first_and_go_on() -> None:
    Slow()
    loop(20)


def try_and_go_on() -> None:
    try:
        loop(20)
    except Exception:
        loop(20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_a_destructor_has_met_comes_again() -> None:
    started = time.monotonic()
    with pytest.raises(TimeIsUp), time_limit(0.1, every=0.3):
        ignore_the_first_and_go_on()
    assert time.monotonic() - started < 10


def test_code_that_handles_all_exceptions_is_ended() -> None:
    with pytest.raises(TimeIsUp), time_limit(0.05):
        try_and_go_on()


def test_what_ends_in_time_leaves_nothing_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(0.05):
        pass
    loop(0.1)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_other_threads_have_no_limit() -> None:
    ended = []

    def run() -> None:
        with time_limit(0.01):
            loop(0.05)
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended
