"""Training throughput."""

from __future__ import annotations

import time

from torch import Tensor


class Throughput:
    """Measures tokens per second from the end of one training batch to the end of the next."""

    def __init__(self) -> None:
        self._last: tuple[float, Tensor] | None = None

    def add(self, tokens: Tensor) -> Tensor | None:
        """Count a batch.

        Args:
            tokens: Its number of tokens, without padding.

        Returns:
            The tokens per second since the previous batch; None for the first one, and after a pause.
        """
        now, last = time.perf_counter(), self._last
        self._last = now, tokens
        return None if last is None else last[1] / (now - last[0])

    def pause(self) -> None:
        """Exclude the time until the next batch, which is not spent on training."""
        self._last = None
