"""The state of a run, as displayed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from milora_lightning.screen.figures import duration, number, progress, speed


@dataclass
class Work:
    """A piece of work with its progress.

    Attributes:
        name: Its name on the screen, such as ``"Validating"``.
        total: Number of units; None if it is not known.
        unit: Name of the units, in the plural.
        done: Number of units done.
        note: Further text to show.
        started: Start time by ``time.monotonic``.
    """

    name: str
    total: float | None = None
    unit: str = ""
    done: float = 0
    note: str = ""
    started: float = field(default_factory=lambda: time.monotonic())  # looked up each time: tests stop it

    @property
    def seconds(self) -> float:
        """Seconds since it started."""
        return time.monotonic() - self.started

    @property
    def count(self) -> str:
        """The number of units done, as text; empty if there are no units.

        >>> Work("Validating", 8, "batches", 3, "token 5").count
        '3 of 8 batches, token 5'
        """
        units = f"{progress(self.done, self.total)} {self.unit}" if self.unit else ""
        return ", ".join(part for part in (units, self.note) if part)

    @property
    def share(self) -> float | None:
        """The fraction that is done; None if the total is not known."""
        if self.total is None or not 0 < self.total < math.inf:
            return None
        return min(1.0, self.done / self.total)


@dataclass
class RunState:
    """Everything that the display shows.

    Attributes:
        training: The optimizer steps; None before the first step and outside training.
        work: Other work in progress: loading, initializing, evaluating.
        loss: The smoothed training loss.
        rate: The learning rate.
        tokens: Tokens per second; None if they are not counted.
        steps: Optimizer steps per second.
        memory: Peak memory in GB.
        end: Expected end of the run by ``time.monotonic``; None if it is not known.
        metrics: Further metrics that the module logs to the progress bar.
    """

    training: Work | None = None
    work: Work | None = None
    loss: float | None = None
    rate: float | None = None
    tokens: float | None = None
    steps: float | None = None
    memory: float | None = None
    end: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def figures(self) -> list[str]:
        """The measured values, each as text."""
        rows = [] if self.loss is None else [f"loss {number(self.loss)}"]
        rows += [] if self.rate is None else [f"lr {number(self.rate)}"]
        if self.tokens is not None:
            rows.append(speed(self.tokens, "tokens"))
        elif self.steps is not None:
            rows.append(speed(self.steps, "steps"))
        rows += [] if self.memory is None else [f"peak {self.memory:.1f} GB"]
        return rows + [f"{name} {number(value)}" for name, value in self.metrics.items()]

    @property
    def left(self) -> str:
        """The remaining time as text; empty if it is not known."""
        return "" if self.end is None else f"{duration(self.end - time.monotonic())} left"

    def line(self) -> str:
        """Return the whole state as one line.

        >>> RunState(Work("Training", 90, "steps", 37), loss=2.3112, rate=3e-4, steps=0.5, memory=1.23).line()
        'Training: 37 of 90 steps, loss 2.311, lr 3e-4, 2 s a step, peak 1.2 GB'
        """
        parts = []
        if self.training is not None and self.work is None:
            parts.append(", ".join([f"Training: {self.training.count}", *self.figures]))
        if self.work is not None:
            count = f": {self.work.count}" if self.work.count else ""
            parts.append(f"{self.work.name}{count}, {duration(self.work.seconds)}")
        return ", ".join([*parts, *([self.left] if self.left else [])])
