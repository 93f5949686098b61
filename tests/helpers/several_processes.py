"""Starting several processes, and comparing what they have with what one process has."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
Runs = dict[str, dict[str, Any]]
FILES = dict.fromkeys(("train", "validation", "test"), "examples.jsonl")
CONFIG = {
    "model": {"name_or_path": "llama", "max_new_tokens": 4, "warmup_steps": 2},
    "adapter": {"r": 4},
    "data": {"source": {"class_path": "milora_lightning.data.Files", "init_args": FILES}, "batch_size": 4},
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
}


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=900,  # two processes import torch on a busy machine
        check=False,
    )


def run_program(script: Path, *arguments: str) -> None:
    """Run a script in this process, a fork, as if it were all that it runs: Lightning starts others by its path."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def losses(ranks: tuple[Runs, Runs], name: str) -> torch.Tensor:
    """The losses of the global batches: each rank's share, averaged."""
    return torch.tensor([run[name]["losses"] for run in ranks]).mean(0)


def assert_equal_to_rounding(ranks: tuple[Runs, Runs], name: str, whole: dict[str, Any]) -> None:
    first, second = (run[name] for run in ranks)
    steps = len(first["losses"])
    torch.testing.assert_close(losses(ranks, name), torch.tensor(whole["losses"][-steps:]), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(first["norms"]), torch.tensor(whole["norms"][-len(first["norms"]) :]))
    assert first["state"].keys() == whole["state"].keys()
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key])
        torch.testing.assert_close(value, whole["state"][key], rtol=1e-4, atol=1e-6)
    assert first["base"] == whole["base"]
    for ours, theirs in zip(first["results"], whole["results"], strict=True):  # 11 examples: uneven shares
        assert ours == pytest.approx(theirs, rel=1e-5)
