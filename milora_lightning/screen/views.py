"""Two ways to show how far a run is: live on a terminal, in lines everywhere else."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from milora_lightning.screen.figures import duration
from milora_lightning.screen.state import RunState, Work


class View(Protocol):
    """A way to show a state that changes."""

    def start(self) -> None:
        """Begin to show it."""

    def tick(self) -> None:
        """Show it now, if it is time."""

    def stop(self) -> None:
        """End; what other parts of a program print comes after that."""


class LiveView:
    """Lines at the foot of a terminal that move by themselves; what is printed goes above them.

    A thread draws them, so that they move also while one operation takes long. It reads nothing but numbers and
    words: no figure waits for a device while it is drawn.
    """

    def __init__(self, console: Console, state: RunState) -> None:
        self.state = state
        self._spinner = Spinner("dots")
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=4, transient=True)

    def start(self) -> None:
        """Begin to draw."""
        self._live.start()

    def tick(self) -> None:
        """Leave it to the thread."""

    def stop(self) -> None:
        """Take the lines away."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        state = self.state
        training, work = state.training, state.work
        rows: list[RenderableType] = []
        if training is not None:
            rows.append(self._row(training, state.left, spin=work is None))
            rows.append(Text(" · ".join(state.figures), style="cyan"))
        if work is not None:
            rows.append(self._row(work, "", spin=True))
        return Group(*rows)

    def _row(self, work: Work, left: str, spin: bool) -> Table:
        row = Table.grid(padding=(0, 1), expand=True)
        for _ in range(2):
            row.add_column(no_wrap=True)
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_column(ratio=1, min_width=4)
        row.add_column(no_wrap=True, justify="right")
        share = work.share
        bar = ProgressBar(total=1.0, completed=share, width=None) if share is not None else Text()
        times = ", ".join(part for part in (duration(work.seconds), left) if part)
        spinner = self._spinner if spin else Text(" ")
        row.add_row(spinner, Text(work.name, style="bold"), Text(work.count), bar, Text(times, style="dim"))
        return row


class LineView:
    """Lines for files and pipes: soon at the beginning, then less and less often."""

    FIRST, LAST = 10.0, 60.0
    """Seconds between two lines, at the beginning and in the long run."""

    def __init__(self, state: RunState) -> None:
        self.state = state

    def start(self) -> None:
        """Begin to count the time."""
        self._started = self._printed = time.monotonic()

    def tick(self) -> None:
        """Print a line, if the last is long enough ago."""
        now = time.monotonic()
        if now - self._printed >= min(self.LAST, max(self.FIRST, (now - self._started) / 20)):
            self._printed = now
            if line := self.state.line():
                print(line, flush=True)

    def stop(self) -> None:
        """There is nothing to take away."""
