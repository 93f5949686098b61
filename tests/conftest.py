from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; a test never waits for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models, several test processes: more threads wait for each other

from typing import Any
from unittest import mock

import pytest
import torch
from helpers.clock import Clock

from milora_lightning.starts import registry

# The second device would be the accelerator of every process that looks there for doctests.
collect_ignore = ["helpers", "second_device.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, of which Lightning would take all there are, but from the tests that need one (pytest -m gpu)."""
    if "gpu" not in config.getoption("markexpr", "").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first asks for them; programs that tests start, too
        torch.backends.mps.is_available = lambda: False


@pytest.fixture(autouse=True)
def _registered_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the starts that a test, an example or a block of the docs registers."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


@pytest.fixture
def svd_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the matrices that go through torch's SVD."""
    shapes: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def record(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(matrix.shape))
        return svd(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", record)
    return shapes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stop time; the test says when it is."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def set_to(seconds: float) -> None:
        now[0] = 100.0 + seconds

    return set_to


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """Connect this process as the only rank of a group.

    Lightning leaves the rank in the environment, by which a later run would take itself for one that was launched, and
    wait for the others.
    """
    with mock.patch.dict(os.environ):
        os.environ["MASTER_PORT"] = "0"
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()
