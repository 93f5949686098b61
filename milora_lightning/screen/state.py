"""How far a run is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from milora_lightning.screen.figures import duration, number, progress, speed


@dataclass
class Work:
    """One thing that is being done.

    Attributes:
        name: What, as on the screen: ``"Validating"``.
        total: How many units it has; None if nobody knows.
        unit: What they are called, in the plural.
        done: How many are done.
        note: What else there is to say now.
        started: When it began, by ``time.monotonic``.
    """

    name: str
    total: float | None = None
    unit: str = ""
    done: float = 0
    note: str = ""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return time.monotonic() - self.started

    @property
    def count(self) -> str:
        """How much of it is done, in words; empty if it has no parts.

        >>> Work("Validating", 8, "batches", 3, "token 5").count
        '3 of 8 batches, token 5'
        """
        units = f"{progress(self.done, self.total)} {self.unit}" if self.unit else ""
        return ", ".join(part for part in (units, self.note) if part)

    @property
    def share(self) -> float | None:
        """The share that is done, if that is known."""
        if self.total is None or not 0 < self.total < math.inf:
            return None
        return min(1.0, self.done / self.total)


@dataclass
class RunState:
    """All that the screen shows.

    Attributes:
        training: The optimizer's steps; None before the first and outside training.
        work: What else is going on: loading, initializing, evaluating.
        loss: The training loss, smoothed.
        rate: The learning rate.
        tokens: Tokens per second, or None where nobody counts them.
        steps: Optimizer steps per second.
        memory: Peak memory in GB.
        end: When the run will be over, by ``time.monotonic``, if that is known.
        metrics: Others that the module shows.
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
        """What has been measured, in words."""
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
        """How long the run will take from now, in words; empty if that is not known."""
        return "" if self.end is None else f"{duration(self.end - time.monotonic())} left"

    def line(self) -> str:
        """Say all in a line.

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
