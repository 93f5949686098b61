"""What a resumed run takes over from a checkpoint's optimizer, says and refuses, without a run."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from milora_lightning.training.resuming import KEY, check_same, check_whole, describe, options, tell_differences
from milora_lightning.training.schedules import make_schedule


def checkpoint_of(optimizer: Optimizer, name: str = "linear", length: float = 10) -> dict[str, Any]:
    return {
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [make_schedule(name, optimizer, 0, {}, length).state_dict()],
        KEY: describe(optimizer, name, length),
    }


def parameters(number: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(number)]


def told(before: dict[str, Any], now: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    optimizer = AdamW(parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the optimizer is the same
        tell_differences({KEY: before}, now, options(optimizer), optimizer)
    output = capsys.readouterr()
    return output.out + output.err


def test_a_run_that_has_become_longer_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    short, long, endless = (describe(AdamW(parameters()), "linear", n) for n in (10, 20, math.inf))
    assert told(short, short, capsys) == ""
    said = told(short, long, capsys)
    assert "follows linear over 20 steps" in said
    assert "followed linear over 10 steps" in said
    assert "follows linear over unlimited steps" in told(short, endless, capsys)


def test_the_highest_rate_is_compared_and_not_the_rate_of_the_moment() -> None:
    """In the middle of a schedule, the rate is another one than at its start, in every run."""
    optimizer = AdamW(parameters(), lr=0.1)
    schedule = make_schedule("linear", optimizer, 0, {}, 10)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] < 0.1
    assert [group["lr"] for group in options(optimizer)] == [0.1]
    given = options(AdamW(parameters(), lr=0.2))
    now = describe(optimizer, "linear", 10)
    with pytest.warns(match=r"as in the checkpoint, with lr=0\.1 \(not 0\.2\)"):
        tell_differences({KEY: now}, now, given, optimizer)


@pytest.mark.parametrize("described", [True, False])
def test_another_optimizer_is_refused(described: bool) -> None:
    checkpoint = checkpoint_of(AdamW(parameters()))
    if not described:  # as in older checkpoints
        del checkpoint[KEY]
    same, other = AdamW(parameters(), lr=1.0, betas=(0.5, 0.9), foreach=True), SGD(parameters(), momentum=0.9)
    check_same(checkpoint, same, make_schedule("cosine", same, 0, {}, 10))
    with pytest.raises(ValueError, match=r"this run's optimizer is torch\.optim\.sgd\.SGD"):
        check_same(checkpoint, other, make_schedule("linear", other, 0, {}, 10))


def test_another_number_of_groups_is_refused() -> None:
    one, two = AdamW(parameters()), AdamW([{"params": parameters()}, {"params": parameters()}])
    for before, now, said in ((one, two, "has 1 groups .* this run's 2"), (two, one, "has 2 groups .* this run's 1")):
        with pytest.raises(ValueError, match=f"{said}: resume with the same loraplus_lr_ratio"):
            check_same(checkpoint_of(before), now, make_schedule("linear", now, 0, {}, 10))


@pytest.mark.parametrize(("before", "now"), [("linear", "reduce_lr_on_plateau"), ("reduce_lr_on_plateau", "linear")])
def test_a_schedule_of_another_kind_is_refused(before: str, now: str) -> None:
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match=rf"lr_scheduler \({before}\) and this run's are of different kinds"):
        check_same(checkpoint_of(AdamW(parameters()), before), optimizer, make_schedule(now, optimizer, 0, {}, 10))


def test_another_schedule_over_as_many_steps_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    linear, cosine = (describe(AdamW(parameters()), name, 10) for name in ("linear", "cosine"))
    assert "follows cosine over 10 steps; up to the checkpoint it followed linear" in told(linear, cosine, capsys)


@pytest.mark.parametrize("lacks", ["optimizer_states", "lr_schedulers"])
def test_a_checkpoint_of_weights_only_is_refused(lacks: str) -> None:
    checkpoint = checkpoint_of(AdamW(parameters()))
    check_whole(checkpoint)
    del checkpoint[lacks]
    with pytest.raises(ValueError, match="holds weights only"):
        check_whole(checkpoint)
