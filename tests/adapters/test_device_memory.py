"""What surgery takes of a device: a bounded number of copies of one weight, and never a second weight."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.decomposition_weights import make_weight
from helpers.live_memory import LiveMemory
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from milora_lightning import LoRAConfig, inject, lora_layers
from milora_lightning.adapters import decomposing
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.linalg import devices, eigen
from milora_lightning.linalg.devices import CPU, Way
from milora_lightning.models.memory import decomposition_size

SHAPE = (256, 688)
"""A sixteenth of a Llama's feed-forward layer, 4096 x 11008."""


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CPU do what other devices do: whole Gram matrices, and all of their eigenvectors by torch."""
    monkeypatch.setattr(eigen, "_on_cpu", lambda matrix: False)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
def test_one_weight_takes_at_most_three_float64_copies(
    monkeypatch: pytest.MonkeyPatch, svd_shapes: list[Any], shape: tuple[int, int], single: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(devices, "best_way", lambda device, shape, r: Way(CPU, single))
    weight = make_weight(shape, "gaussian", dtype)
    copy = 8 * weight.numel()
    with LiveMemory() as memory:
        initial_factors(weight, 4)
    workspace = 2 * min(shape) ** 2 * (4 if single else 8)  # of LAPACK's and cuSOLVER's syevd, which torch does not see
    assert memory.peak > copy
    assert memory.peak + workspace <= 3 * copy
    estimated = decomposition_size(shape, "cuda")
    assert estimated * (0.5 if single else 0.9) < memory.peak + workspace < 1.1 * estimated
    assert all(max(svd) < min(shape) for svd in svd_shapes)


def test_copies_are_seen() -> None:
    with LiveMemory() as memory:
        kept = torch.ones(1000)
        for _ in range(3):
            kept = kept + 1
        view = kept.view(10, 100).mT
    assert memory.peak == 2 * 4000
    assert memory.alive() == 4000
    del kept, view
    assert memory.alive() == 0


@pytest.mark.parametrize(("device", "most"), [("meta", 1), ("cpu", 3)])
def test_another_device_holds_one_weight_at_a_time(monkeypatch: pytest.MonkeyPatch, device: str, most: int) -> None:
    """Weights are collected as shards are: each in memory of its own. A CPU collects while it decomposes."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    inject(model, LoRAConfig(r=4))
    collected: list[StorageWeakRef] = []
    alive = []

    def collect(layer: Any, rank: int) -> Tensor:
        weight: Tensor = layer.base_layer.weight.detach().clone()
        collected.append(StorageWeakRef(weight.untyped_storage()))
        alive.append(sum(not reference.expired() for reference in collected))
        return weight

    def decompose(name: str, layer: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        return initial_factors(weight, layer.r)

    class Late(ThreadPoolExecutor):
        """Starts late, so that everything waits that may."""

        def submit(self, *args: Any, **options: Any) -> Future[Any]:  # type: ignore[override]
            return super().submit(late, *args, **options)

    def late(function: Any, *args: Any) -> Any:
        torch.mm(torch.ones(300, 300), torch.ones(300, 300))
        return function(*args)

    monkeypatch.setattr(decomposing, "pretrained_weight", collect)
    monkeypatch.setattr(decomposing, "ThreadPoolExecutor", Late)
    monkeypatch.setattr(decomposing, "SMALL", 0)
    layers = list(lora_layers(model).items())
    found = list(decomposing.decompose_all(layers, decompose, device=torch.device(device)))
    assert len(found) == len(collected) == 6
    assert max(alive) <= most
    assert all(factor.device.type == "cpu" for _, pair in found for factor in pair)
