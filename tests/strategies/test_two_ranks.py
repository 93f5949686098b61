"""Two forked ranks do two steps as one process does, in a second: what the slow tests of two ranks look at closely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_runs import STEPS, fit
from helpers.forked import run_ranks
from helpers.several_processes import assert_equal_to_rounding


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_two_ranks_have_the_gradients_of_one(kind: str, folder: Path, single: dict[str, Any], tmp_path: Path) -> None:
    start = {"ckpt_path": folder / "single" / f"step={STEPS - 2}.ckpt"}

    def run() -> None:
        done = fit(folder, f"{kind}-quick", kind, devices=2, resume=start)
        torch.save(done, tmp_path / f"{torch.distributed.get_rank()}.pt")

    assert run_ranks(run, tmp_path, limit=200) == [0, 0], (tmp_path / "output0.txt").read_text()[-3000:]
    first, second = ({kind: torch.load(tmp_path / f"{rank}.pt", weights_only=True)} for rank in range(2))
    assert len(first[kind]["losses"]) == 2
    assert_equal_to_rounding((first, second), kind, single)
