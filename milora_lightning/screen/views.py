"""Two views of a run's state: live on a terminal, and as printed lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Protocol

import rich
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from milora_lightning.screen.figures import duration
from milora_lightning.screen.state import RunState, Work

HEIGHT = 3


class View(Protocol):
    """A way to show the changing state of a run."""

    def start(self) -> None:
        """Begin to show it."""

    def tick(self) -> None:
        """Show the current state, if an update is due."""

    def stop(self) -> None:
        """Stop showing it, and leave the terminal to other output."""


def open_view(state: RunState) -> View:
    """Start to show a run's state: live on a terminal, as printed lines everywhere else."""
    console = rich.get_console()
    live = console.is_terminal and not console.is_dumb_terminal
    view: View = LiveView(console, state) if live else LineView(state)
    view.start()
    return view


class LiveView:
    """Lines at the bottom of a terminal that update by themselves; other output appears above them.

    A thread draws them, so they keep moving during long operations. It reads only numbers and strings from the state,
    and so never waits for a device.
    """

    def __init__(self, console: Console, state: RunState, per_second: float = 4) -> None:
        self.state = state
        self._console = console
        self._spinner = Spinner("dots")
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._live = Live(console=console, get_renderable=self.draw, refresh_per_second=per_second, transient=True)

    def start(self) -> None:
        """Begin to draw."""
        before = _files(sys.stdout) | _files(sys.stderr)
        self._live.start(refresh=True)  # before the thread draws, so that the first print knows what to erase
        # Logging handlers still hold the original streams, and would write across the lines.
        self._handlers = [(h, h.stream) for h in _stream_handlers() if _files(h.stream) & before]
        for handler, _ in self._handlers:
            handler.setStream(sys.stderr)

    def tick(self) -> None:
        """Do nothing: the thread updates the lines."""

    def stop(self) -> None:
        """Remove the lines."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []
        self._live.stop()

    def draw(self) -> RenderableType:
        """Return the lines for the current state."""
        state = self.state
        training, work = state.training, state.work
        rows: list[RenderableType] = []
        if training is not None:
            rows.append(self._row(training, state.left, spin=work is None))
            figures = Text(" · ".join(state.figures), style="cyan")
            figures.truncate(self._width, overflow="ellipsis")
            rows.append(figures)
        if work is not None:
            rows.append(self._row(work, "", spin=True))
        # Always the same number of lines: Rich may print in one thread while another draws, and would then erase as
        # many lines as there were before.
        return Group(*[Text()] * (HEIGHT - len(rows)), *rows)

    @property
    def _width(self) -> int:
        # Room for ^C, perhaps twice, which the terminal echoes at the cursor: it must not wrap to a new line.
        return self._console.width - 4

    def _row(self, work: Work, left: str, spin: bool) -> Table:
        """Lay out a row; a narrow terminal first loses the bar, then the end of the text, but never the times."""
        times = ", ".join(part for part in (duration(work.seconds), left) if part)
        room = self._width - len(times) - 4  # the spinner, and a space between each two columns
        words = Text(work.name, style="bold").append(f" {work.count}" if work.count else "", style="not bold")
        words.truncate(room, overflow="ellipsis")
        row = Table.grid(padding=(0, 1))
        row.width = self._width
        row.add_column(width=1)
        row.add_column(width=words.cell_len)
        row.add_column(ratio=1)
        row.add_column(width=len(times))
        share, bar = work.share, room - words.cell_len
        shown = ProgressBar(total=1.0, completed=share, width=bar) if share is not None and bar >= 4 else Text()
        row.add_row(self._spinner if spin else Text(" "), words, shown, Text(times, style="dim"))
        return row


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    handlers = {handler: None for logger in loggers for handler in logger.handlers}
    # Handlers whose `stream` is a property look up sys.stderr each time, and need no redirection.
    return [
        handler
        for handler in handlers
        if isinstance(handler, logging.StreamHandler)
        and not isinstance(getattr(type(handler), "stream", None), property)
    ]


def _files(stream: Any) -> set[int]:
    """Return the file descriptor of a stream as a set; empty if it has none."""
    try:
        return {stream.fileno()}
    except (AttributeError, OSError, ValueError):
        return set()


class LineView:
    """Lines for files and pipes: frequent at the beginning, then less and less often."""

    FIRST, LAST = 10.0, 60.0
    """Seconds between two lines, at the beginning and later on."""

    def __init__(self, state: RunState) -> None:
        self.state = state

    def start(self) -> None:
        """Start the clock."""
        self._started = self._printed = time.monotonic()

    def tick(self) -> None:
        """Print a line, if the last one was printed long enough ago."""
        now = time.monotonic()
        if now - self._printed >= min(self.LAST, max(self.FIRST, (now - self._started) / 20)):
            self._printed = now
            if line := self.state.line():
                print(line, flush=True)

    def stop(self) -> None:
        """Do nothing: printed lines stay."""
