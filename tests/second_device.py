"""Whole runs on a second device that computes (helpers/second_device.py), for a process of their own.

tests/test_second_device.py starts it; by hand: pytest tests/second_device.py
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decomposition_weights import R, assert_is_slice, make_weight
from helpers.second_device import DEVICE, Count, OnDevice, counting, strategy
from helpers.whole_runs import KINDS, STEPS, assert_same, everything, fit, write_base
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from milora_lightning import CausalLMModule, LoRAConfig, initialize, inject, lora_layers, singular_slice
from milora_lightning.analysis.effect import relative_effect
from milora_lightning.analysis.intruders import Intruders, corrections
from milora_lightning.analysis.magnitude import update_size, weight_norms
from milora_lightning.analysis.subspace import Update
from milora_lightning.export.compression import compress
from milora_lightning.linalg import devices, partial, products, singular
from milora_lightning.linalg.devices import CPU, Way

BUDGET = json.loads((Path(__file__).parent / "helpers" / "launches.json").read_text())
EXPERTS = ("/experts", "/integrations/moe", "/models/mixtral/")  # transformers' code that sorts tokens by expert


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp(kind), kind)


def there() -> dict[str, Any]:
    return {"strategy": strategy(), "accelerator": "auto"}


class Steps(Callback):
    """Counts what happens in each training step, and with the batch's way to the device before the next."""

    def __init__(self) -> None:
        self.counts: list[Count] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._context = counting()
        self.counts.append(self._context.__enter__())

    def on_train_batch_end(self, *_: Any) -> None:
        self._context.__exit__(None, None, None)


def test_a_run_is_that_of_the_cpu(kind: str, base: Path) -> None:
    """Surgery, loss, backward, optimizer, monitors, metrics, checkpoint, answers and export, with nothing mixed.

    Without dropout, which each device draws in its own way.
    """
    again = kind in ("llama", "mixtral")
    found = everything(base, "there", there(), dropout=0, again=again)
    assert found["devices"] == {DEVICE}
    assert_same(found, everything(base, "here", {}, dropout=0, again=again))


def test_a_step_waits_for_nothing_and_launches_no_more_than_it_may(kind: str, base: Path) -> None:
    """One wait is transformers', which looks whether positions restart; its experts wait, too, outside of our code."""
    steps = Steps()
    fit(base, "counted", [steps], there(), limit_val_batches=0)
    assert len(steps.counts) == STEPS
    for count in steps.counts[1:]:
        assert count.own_waits == []
        assert len([wait for wait in count.waits if not any(part in wait[0] for part in EXPERTS)]) <= 1, count.waits
    launches = max(steps.counts[1:], key=lambda count: count.launches.total()).launches
    assert launches.total() <= BUDGET["launches"][kind], launches.most_common()


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_labels_that_change_on_the_way_are_looked_at_again_which_waits(base: Path) -> None:
    class Masks(CausalLMModule):
        def loss(self, batch: Any) -> Any:
            batch["labels"][:, -2:] = -100
            return super().loss(batch)

    steps = Steps()
    fit(base, "masks", [steps], there(), lm=Masks(str(base / "model"), warmup_steps=2), limit_val_batches=0)
    assert all(count.own_waits for count in steps.counts)


def test_a_solver_that_fails_there_is_replaced_by_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning; the factors are those of the CPU."""
    monkeypatch.setattr(devices, "best_way", lambda device, shape, r: Way(device))

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 40))

    eigh, failures = torch.linalg.eigh, (torch.linalg.LinAlgError("failed to converge"), torch.OutOfMemoryError("full"))
    for failure in failures:

        def fails(matrix: torch.Tensor, *args: Any, failure: Exception = failure, **kwargs: Any) -> Any:
            if matrix.device == DEVICE:
                raise failure
            return eigh(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, "eigh", fails)
        here, there = model(), model().to(DEVICE)
        for each in (here, there):
            inject(each, LoRAConfig(r=4))
        initialize(here, cache=False)
        with pytest.warns(UserWarning, match=r"second:0 could not decompose .* of layer '1' \(f.*\): the CPU does"):
            initialize(there, cache=False)
        for ours, theirs in zip(lora_layers(there).values(), lora_layers(here).values(), strict=True):
            assert ours.lora_A.device == DEVICE
            torch.testing.assert_close(ours.delta_weight().cpu(), theirs.delta_weight())
            torch.testing.assert_close((ours.initial_B @ ours.initial_A).cpu(), theirs.initial_B @ theirs.initial_A)


@pytest.mark.parametrize("way", [Way(DEVICE), Way(DEVICE, single=True), Way(CPU)], ids=["float64", "float32", "cpu"])
@pytest.mark.parametrize("large", [0, partial.LARGE], ids=["krylov", "dense"])
def test_every_way_of_decomposing_stays_on_its_device(monkeypatch: pytest.MonkeyPatch, way: Way, large: int) -> None:
    monkeypatch.setattr(devices, "best_way", lambda device, shape, r: way)
    monkeypatch.setattr(partial, "LARGE", large)
    for shape in ((160, 160), (96, 200), (200, 96)):
        weight = make_weight(shape, 1e3)
        for which in ("minor", "principal", "middle"):
            found = singular_slice(weight.to(DEVICE), R, which)
            assert all(isinstance(x, OnDevice) for x in found)
            assert_is_slice(singular.SingularSlice(*(x.cpu() for x in found)), weight, R, which)


@pytest.mark.parametrize("default", [False, True])
def test_a_default_device_is_not_needed_and_does_not_harm(default: bool) -> None:
    """With torch.set_default_device, or in Lightning's configure_model, what is made without a device is there."""
    torch.manual_seed(0)
    weight = torch.randn(200, 210)
    with DEVICE if default else nullcontext():
        for which in ("minor", "principal", "middle", "random"):
            found = singular_slice(weight.to(DEVICE), 4, which, torch.Generator().manual_seed(0))
            expected = singular_slice(weight, 4, which, torch.Generator().manual_seed(0))
            assert all(isinstance(x, OnDevice) for x in found)
            torch.testing.assert_close(found.S.cpu(), expected.S)
        for init in ("milora", "pissa", "middle", "random", "lora", "mica", "olora", "orthogonal", "gaussian x minor"):
            model = nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 40)).to(DEVICE)
            inject(model, LoRAConfig(r=4, init=init))
            initialize(model, cache=False)
            assert all(p.device == DEVICE for p in model.parameters())


def test_a_device_without_float64_has_its_updates_measured_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (products, devices):
        monkeypatch.setattr(module, "has_double", lambda device: device.type == "cpu")
    B, A, weight = torch.randn(20, 3), torch.randn(3, 30), torch.randn(20, 30)
    here, there = Update.of(B, A), Update.of(B.to(DEVICE), A.to(DEVICE))
    assert not isinstance(there.S, OnDevice)
    torch.testing.assert_close(there.S, here.S)
    assert there.amplification(weight.to(DEVICE), 2) == pytest.approx(here.amplification(weight, 2))
    assert all(isinstance(x, OnDevice) for x in compress(B.to(DEVICE), A.to(DEVICE), 2)[:2])


def test_updates_are_measured_there_as_on_the_cpu() -> None:
    """Their size, their intruders, and their effect, which waits for nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20))
    inject(net, LoRAConfig(r=3))
    initialize(net, cache=False)
    with torch.no_grad():
        lora_layers(net)["0"].lora_B.add_(torch.randn(20, 3))
    x, found = torch.randn(5, 30), []
    for device in ("cpu", DEVICE):
        (layer,) = lora_layers(net.to(device)).values()
        here = x.to(device)
        with torch.no_grad():
            y = layer(here)
            with counting() as count:
                effect = relative_effect(layer, here, y)
        assert not count.waits
        (left, right), *_ = corrections({"0": layer}, Intruders(keep=0.5, threshold=0.9)).values()
        assert left.device.type == right.device.type == layer.lora_A.device.type
        found.append([update_size([layer], [weight_norms(layer)]).cpu(), effect.cpu(), (left @ right).cpu()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_what_a_gpu_refuses_is_refused_and_what_waits_is_counted() -> None:
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="at least two devices"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, device=DEVICE, generator=torch.Generator())
    with counting() as count:
        x.sum().item()
        x[x > 0]
        torch.tensor([1.0], device=DEVICE)
        x.to("cpu")
        torch.ones(2).to(DEVICE, non_blocking=True)
    assert [name for _, name in count.waits] == ["_local_scalar_dense", "index", "_copy_from", "_to_copy"]
    assert all(place.startswith(__file__) for place, _ in count.waits)
    assert count.own_waits == []
    assert {"sum", "gt", "index"} <= set(count.launches)
