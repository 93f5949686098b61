"""A clock that tests set."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[float], None]
"""Sets the time to so many seconds after the beginning of the test, which is at 100."""
