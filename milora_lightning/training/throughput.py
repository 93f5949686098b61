"""How fast a run trains."""

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
            The tokens per second since the batch before it; None for the first one, and after a pause.
        """
        now, last = time.perf_counter(), self._last
        self._last = now, tokens
        return None if last is None else last[1] / (now - last[0])

    def pause(self) -> None:
        """Leave out the time until the next batch, which something other than training takes."""
        self._last = None
