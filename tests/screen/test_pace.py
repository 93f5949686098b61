"""The averages that the screen shows, by a clock that the test sets."""

from __future__ import annotations

import math

import pytest
import torch

from milora_lightning.screen.pace import SMOOTHING, Pace, SmoothedLoss


def test_seconds_are_per_step_without_pauses_and_the_first_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("milora_lightning.screen.pace.time.monotonic", lambda: now)
    pace = Pace()
    assert pace.seconds is None
    pace.start()
    now = 60.0  # compilation
    pace.lap(1)
    assert pace.seconds == 60
    now = 66.0
    pace.lap(3)
    assert pace.seconds == 2  # the first one is dropped
    pace.pause()
    now = 1000.0  # a validation
    pace.start()
    now = 1002.0
    pace.lap(1)
    assert pace.seconds == 2
    now = 1014.0
    pace.lap(4)
    assert pace.seconds == pytest.approx(20 / 8)  # each step counts the same, whatever its lap


def test_a_loss_is_a_weighted_mean_of_those_that_are_finite() -> None:
    loss = SmoothedLoss()
    assert loss.value() is None
    values = (4.0, 2.0, math.inf, 1.0)
    for value in values:
        loss.add(torch.tensor(value))
        if math.isinf(value):
            assert loss.value() == math.inf  # what has just gone wrong is shown
    finite = [value for value in values if math.isfinite(value)]
    weights = [(1 - SMOOTHING) ** i for i in range(len(finite))][::-1]
    mean = sum(w * value for w, value in zip(weights, finite, strict=True)) / sum(weights)
    assert loss.value() == pytest.approx(mean)
