"""Two processes on the CPU train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model
from distributed_runs import STEPS, fit
from transformers import AutoModelForCausalLM

from milora_lightning.sharing import cost, share_out

TESTS = Path(__file__).parent
Runs = dict[str, dict[str, Any]]


def launch(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *launcher, str(TESTS / script), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny_model(folder / "llama", "llama")
    save_tiny_model(folder / "gpt2", "gpt2")
    inner = AutoModelForCausalLM.from_pretrained(folder / "gpt2").transformer
    inner.save_pretrained(folder / "gpt2")  # without the prefix that the model has, as on the Hub
    return folder


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    return fit(folder, "single")


@pytest.fixture(scope="module")
def ranks(folder: Path, single: dict[str, Any]) -> tuple[Runs, Runs]:
    done = launch(folder, "distributed_runs.py", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    return first, second
