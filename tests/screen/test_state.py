"""What the lines on the screen say, by a clock that the test sets."""

from __future__ import annotations

import io
import logging
import math
import sys

import pytest
import torch
from helpers.clock import Clock
from rich.console import Console

from milora_lightning.screen import figures
from milora_lightning.screen.state import RunState, Work
from milora_lightning.screen.views import LineView, LiveView


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3e-4, "3e-4"),
        (-1.25e-5, "-1.25e-5"),
        (0.009999, "9.999e-3"),
        (0.01, "0.01"),
        (0.81234, "0.8123"),
        (9999.4, "9999"),
        (10000.0, "10000"),
        (81234.6, "81235"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_have_four_digits_and_are_never_rounded_to_zero(value: float, text: str) -> None:
    assert figures.number(value) == text


def test_times_speeds_and_counts() -> None:
    assert [figures.duration(s) for s in (-5, 0.9, 59.9, 60, 3661, 360000)] == [
        *("0:00:00", "0:00:00", "0:00:59", "0:01:00", "1:01:01", "100:00:00")
    ]
    assert [figures.speed(s, "steps") for s in (0, 0.05, 0.999, 1, 2.345, 99.94, 100, 512.4)] == [
        *("0 steps/s", "20 s a step", "1 s a step", "1 steps/s", "2.35 steps/s", "99.9 steps/s"),
        *("100 steps/s", "512 steps/s"),
    ]
    assert [figures.progress(3, total) for total in (8, None, math.inf)] == ["3 of 8", "3", "3"]
    shares = [Work("Testing", total, done=3).share for total in (12, 2, None, 0, math.inf)]
    assert shares == [0.25, 1.0, None, None, None]
    assert [Work("Testing", 8, unit, 3, note).count for unit in ("batches", "") for note in ("token 5", "")] == [
        *("3 of 8 batches, token 5", "3 of 8 batches", "token 5", "")
    ]


def test_memory_is_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_000_000_000)
    assert figures.peak_memory(torch.device("cuda")) == 5
    for resident, said in ((2_500_000_000, 2.5), (None, None)):
        monkeypatch.setattr(figures, "peak_resident", lambda resident=resident: resident)
        assert figures.peak_memory(torch.device("cpu")) == said


def test_a_run_in_one_line(clock: Clock) -> None:
    state = RunState()
    assert state.line() == ""
    state.training = Work("Training", 90, "steps", 37)
    assert state.line() == "Training: 37 of 90 steps"
    state.loss, state.rate, state.steps, state.memory, state.end = 2.3112, 3e-4, 0.5, 1.26, 100.0 + 75
    state.metrics = {"val_loss": 0.5}
    measured = "loss 2.311, lr 3e-4, 2 s a step, peak 1.3 GB, val_loss 0.5"
    assert state.line() == f"Training: 37 of 90 steps, {measured}, 0:01:15 left"
    state.tokens = 512.4  # in place of steps
    assert state.line() == f"Training: 37 of 90 steps, {measured.replace('2 s a step', '512 tokens/s')}, 0:01:15 left"
    state.work = Work("Validating", 8, "batches", 3, started=100.0 + 60)
    clock(65)
    assert state.line() == "Validating: 3 of 8 batches, 0:00:05, 0:00:10 left"
    state.work = Work("Loading the model", started=100.0 + 65)
    assert state.line() == "Loading the model, 0:00:00, 0:00:10 left"


def test_lines_in_a_file_are_frequent_at_first_and_later_one_a_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    state = RunState(Work("Training", 9999, "steps"))
    view = LineView(state)
    clock(0)
    view.start()
    printed = []
    for second in range(1, 3001):
        clock(second)
        view.tick()
        if capsys.readouterr().out:
            printed.append(second)
    gaps = [later - earlier for earlier, later in zip([0, *printed], printed, strict=False)]
    assert gaps[:20] == [10] * 20
    assert gaps == sorted(gaps)
    assert gaps[-1] == 60
    view.stop()
    assert capsys.readouterr().out == ""


def drawn(state: RunState, width: int) -> list[str]:
    output = io.StringIO()
    console = Console(file=output, width=width, color_system=None)
    console.print(LiveView(console, state).draw())
    return output.getvalue().splitlines()


def test_the_lines_are_as_many_whatever_goes_on_and_keep_the_times_on_any_terminal(clock: Clock) -> None:
    training = Work("Training", 90, "steps", 45, started=100.0)
    work = Work("Validating", 8, "batches", 2, started=100.0)
    clock(75)
    heights = set()
    for state in (
        RunState(),
        RunState(training, loss=2.0),
        RunState(work=work),
        RunState(training, work, loss=2.0, end=100.0 + 80),
    ):
        for width in (40, 60, 120):
            lines = drawn(state, width)
            heights.add(len(lines))
            assert max(map(len, lines)) <= width - 4  # room for what a terminal echoes
            assert ("Train" in "".join(lines)) == (state.training is not None)
            assert ("Valid" in "".join(lines)) == (state.work is not None)
            assert "".join(lines).count("0:01:15") == (state.training is not None) + (state.work is not None)
            assert ("0:00:05 left" in "".join(lines)) == (state.end is not None)
    assert len(heights) == 1
    wide, narrow = (drawn(RunState(training), width) for width in (120, 34))
    assert "━" in "".join(wide)
    assert "━" not in "".join(narrow)


def test_handlers_of_logs_write_above_the_lines_and_afterwards_where_they_did() -> None:
    handler, elsewhere = logging.StreamHandler(sys.stderr), logging.StreamHandler(io.StringIO())
    before, apart = handler.stream, elsewhere.stream
    logger = logging.getLogger("some.library")
    logger.handlers = [handler, elsewhere]
    view = LiveView(Console(file=io.StringIO(), force_terminal=True), RunState())
    try:
        view.start()
        assert handler.stream is sys.stderr
        assert handler.stream is not before
        assert elsewhere.stream is apart
        view.tick()
    finally:
        view.stop()
        logger.handlers = []
    assert handler.stream is before
