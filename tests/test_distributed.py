"""Two processes on the CPU train what one process trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model

from milora_lightning.sharing import share_out

TESTS = Path(__file__).parent


def launch(folder: Path, init: str, devices: int, batch_size: int) -> list[dict[str, Any]]:
    arguments = [str(TESTS / "ddp_script.py"), str(folder), init, str(devices), str(batch_size)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"] if devices > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=TESTS, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{init}-{devices}-{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["milora", "lora"])
def test_two_ranks_train_what_one_process_does(init: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama")
    first, second = launch(tmp_path, init, 2, 2)
    (single,) = launch(tmp_path, init, 1, 4)
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key])
        torch.testing.assert_close(value, single["state"][key], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(first["results"], single["results"], strict=True):  # 11 examples: uneven shares
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4)


def test_work_is_shared_out_by_cost() -> None:
    shapes = [(576, 576)] * 30 + [(192, 576)] * 60 + [(1536, 576)] * 60
    owners = share_out(shapes, 4)
    costs = [min(shape) ** 2 * sum(shape) for shape in shapes]
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(4)]
    assert max(loads) < 1.05 * min(loads)
    assert share_out([], 2) == []
