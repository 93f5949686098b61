"""Running averages of step times and losses."""

from __future__ import annotations

import math
import time
from collections import deque

import torch
from torch import Tensor

SMOOTHING = 0.05


class Pace:
    """Average duration of the last steps.

    The very first step includes warm-up and perhaps compilation: it is discarded as soon as there is another one.
    """

    def __init__(self) -> None:
        self._laps: deque[tuple[int, float]] = deque(maxlen=200)
        self._since: float | None = None
        self._first = True

    def start(self) -> None:
        """Begin a lap, unless one is running."""
        if self._since is None:
            self._since = time.monotonic()

    def lap(self, steps: int) -> None:
        """End a lap of that many steps, and begin the next."""
        now = time.monotonic()
        if self._since is not None:
            if self._first and self._laps:
                self._laps.clear()
                self._first = False
            self._laps.append((steps, now - self._since))
        self._since = now

    def pause(self) -> None:
        """Stop measuring until the next start."""
        self._since = None

    @property
    def seconds(self) -> float | None:
        """Seconds per step; None before the first step."""
        steps = sum(steps for steps, _ in self._laps)
        return sum(seconds for _, seconds in self._laps) / steps if steps else None


class SmoothedLoss:
    """Exponential moving average of the losses, kept on their device until it is read.

    A loss that is not finite is returned as the value until the next one, but does not enter the average.

    >>> loss = SmoothedLoss()
    >>> for value in (3.0, float("nan")):
    ...     loss.add(torch.tensor(value))
    >>> loss.value()
    nan
    >>> loss.add(torch.tensor(3.0))
    >>> round(loss.value(), 3)
    3.0
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight: Tensor
        self._last: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Add a loss to the average."""
        self._last = loss = loss.detach().float()
        finite = loss.isfinite()
        if self._sum is None:
            self._sum = self._weight = torch.zeros_like(loss)
        # Dividing by the sum of the weights removes the bias towards an initial value.
        self._sum = torch.where(finite, self._sum * (1 - SMOOTHING) + loss, self._sum)
        self._weight = torch.where(finite, self._weight * (1 - SMOOTHING) + 1, self._weight)

    def value(self) -> float | None:
        """Return the average, which synchronizes with the device; None before the first loss."""
        if self._last is None or self._sum is None:
            return None
        last = self._last.item()
        return (self._sum / self._weight).item() if math.isfinite(last) else last
