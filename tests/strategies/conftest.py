"""One pair of processes makes all runs that the tests of strategies need, also for tests that run side by side."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from helpers.distributed_runs import fit, on_two_ranks, save
from helpers.expert_runs import mixture
from helpers.forked import run_ranks
from helpers.models import save_tiny_model, tiny_tokenizer, write_examples
from helpers.several_processes import CONFIG, Runs
from transformers import AutoModelForCausalLM


def once(folder: Path, name: str, make: Callable[[], object]) -> None:
    """Have the first of several test processes make something, and the others wait for it."""
    with FileLock(folder / f"{name}.lock"):
        if not (folder / f"{name}.done").exists():
            make()
            (folder / f"{name}.done").touch()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    folder.mkdir(exist_ok=True)

    def make() -> None:
        save_tiny_model(folder / "llama", "llama")
        mixture().save_pretrained(folder / "experts")
        tiny_tokenizer().save_pretrained(folder / "experts")
        save_tiny_model(folder / "gpt2", "gpt2")
        undropped = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)  # ranks would drop other entries
        inner = AutoModelForCausalLM.from_pretrained(folder / "gpt2", **undropped).transformer
        inner.save_pretrained(folder / "gpt2")  # without the prefix that the model has, as on the Hub
        write_examples(folder / "examples.jsonl", 12)
        (folder / "mine.yaml").write_text(yaml.safe_dump(CONFIG))

    once(folder, "models", make)
    return folder


@pytest.fixture(scope="session")
def single(folder: Path) -> dict[str, Any]:
    once(folder, "single", lambda: torch.save(fit(folder, "single"), folder / "single.pt"))
    return torch.load(folder / "single.pt", weights_only=True)


@pytest.fixture(scope="session")
def mixture_alone(folder: Path) -> dict[str, Any]:
    """What one process has at the end of training experts."""
    path = folder / "experts-alone.pt"
    once(folder, "mixture-alone", lambda: torch.save(fit(folder, "experts-alone", model="experts"), path))
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def ranks(folder: Path, single: dict[str, Any]) -> tuple[Runs, Runs]:
    def make() -> None:
        statuses = run_ranks(lambda: save(on_two_ranks(folder), folder), folder, limit=1500)  # on a busy machine
        assert statuses == [0, 0], [(folder / f"output{rank}.txt").read_text()[-3000:] for rank in range(2)]

    once(folder, "ranks", make)
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    return first, second
