"""What is frozen stays what it was, and what the user had frozen gets no adapters unasked."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.frozen import Judged, X, fit, mlp
from helpers.models import quiet_trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from packaging import version
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.integrations.finegrained_fp8 import FP8Linear

from milora_lightning import LoRAConfig, MiLoRAInit, adapters_disabled, initialize, inject, load_adapter, lora_layers
from milora_lightning.adapters.parts import TargetNotFoundError


@pytest.mark.parametrize(
    ("frozen", "options", "adapted"),
    [
        ("judge", {}, {"net"}),
        ("", {}, {"net", "judge"}),
        ("net judge", {}, {"net", "judge"}),
        ("judge", {"target_modules": ["0", "2"]}, {"net"}),
        ("judge", {"target_modules": r".*\.(0|2)"}, {"net"}),
        ("judge", {"target_modules": ["judge.0", "net.0"]}, {"net", "judge"}),
        ("judge", {"target_modules": r"judge\..*"}, {"judge"}),
        ("judge", {"module": "judge"}, {"judge"}),
        ("", {"module": "net"}, {"net"}),
        ("", {"exclude_modules": ["judge"]}, {"net"}),
        ("", {"exclude_modules": r"judge\.\d"}, {"net"}),
    ],
)
def test_what_the_user_froze_beside_what_trains_is_adapted_only_by_name(
    frozen: str, options: dict[str, Any], adapted: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Judged(frozen)
    before = copy.deepcopy(module)
    fit(module, tmp_path, **options)
    for name in ("net", "judge"):
        part, pristine = getattr(module, name), getattr(before, name)
        assert bool(lora_layers(part)) == (name in adapted)
        stays = name not in adapted and options.get("module") is None
        if stays:
            assert torch.equal(part(X), pristine(X))
        elif name in adapted:
            assert not torch.equal(part(X), pristine(X))
    printed = " ".join(capsys.readouterr().out.split())
    assert ("judge: none (frozen by you)" in printed) == (frozen == "judge" and "judge" not in adapted)


def test_layers_frozen_one_by_one_and_parts_that_come_later(tmp_path: Path) -> None:
    lower = Judged("")
    lower.net[0].requires_grad_(False)
    assert list(inject(lower, LoRAConfig(r=4))) == ["net.2", "judge.0", "judge.2"]
    assert list(inject(lower, LoRAConfig(r=4))) == ["net.2", "judge.0", "judge.2"]

    class Late(Judged):
        def __init__(self) -> None:
            super().__init__("judge")
            del self.net

        def configure_model(self) -> None:
            self.net = mlp()

    assert set(lora_layers(fit(Late(), tmp_path))) == {"net.0", "net.2"}


def test_codes_that_cannot_train_are_not_taken_for_frozen_by_the_user() -> None:
    def beside_a_norm(layer: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict(
            {"layer": layer.requires_grad_(False), "norm": nn.LayerNorm(16), "head": nn.Linear(16, 16)}
        )

    codes = beside_a_norm(FP8Linear(16, 16, block_size=(8, 8)))
    assert codes["layer"].weight.dtype == torch.float8_e4m3fn
    assert set(inject(codes, LoRAConfig(r=2, target_modules="all-linear"))) == {"layer", "head"}
    for dtype in (torch.float32, torch.bfloat16):  # weights that could have trained
        model = beside_a_norm(nn.Linear(16, 16, dtype=dtype))
        assert set(inject(model, LoRAConfig(r=2, target_modules="all-linear"))) == {"head"}


def test_nothing_left_says_why() -> None:
    module = Judged("net judge")
    module.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(TargetNotFoundError, match=r"'net.0', 'net.2', 'judge.0' and 1 more was frozen by you"):
        inject(module, LoRAConfig(r=4))
    assert set(inject(module, LoRAConfig(r=4, target_modules=["net.0"]))) == {"net.0"}


@pytest.mark.parametrize("options", [{}, {"module": "net"}])
def test_a_checkpoint_finds_its_layers_whatever_is_frozen_when_it_is_loaded(
    options: dict[str, Any], tmp_path: Path
) -> None:
    module = fit(Judged(), tmp_path, **options)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Judged()
    load_adapter(fresh, tmp_path / "a.ckpt")
    assert torch.equal(fresh.net(X), module.net(X))
    assert set(lora_layers(fresh)) == {"net.0", "net.2"}
    resumed = Judged()
    trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(4, cache=False, **options)], max_epochs=2)
    trainer.fit(resumed, ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(resumed.net(X), module.net(X))


class Adversarial(LightningModule):
    """A generator and a discriminator, each with its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = mlp()
        self.discriminator = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 1), nn.Softplus())

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        for optimizer, loss in (
            (
                discriminator,
                lambda: self.discriminator(batch).mean() - self.discriminator(self.generator(batch)).mean(),
            ),
            (generator, lambda: self.discriminator(self.generator(batch)).mean()),
        ):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.generator, self.discriminator)]

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(X, batch_size=16)


def test_what_is_outside_the_named_part_trains_as_the_module_has_it(tmp_path: Path) -> None:
    module = Adversarial()
    before = copy.deepcopy(module)
    fit(module, tmp_path, module="generator")
    assert set(lora_layers(module)) == {"generator.0", "generator.2"}
    for name, p in before.discriminator.named_parameters():
        assert not torch.equal(module.discriminator.get_parameter(name), p), name
    assert module.discriminator[1].num_batches_tracked > 0
    with adapters_disabled(module):
        assert torch.equal(module.generator(X), before.generator(X))
    module.trainer.save_checkpoint(tmp_path / "gan.ckpt")
    fresh = Adversarial()
    load_adapter(fresh, tmp_path / "gan.ckpt")
    assert torch.equal(fresh.eval().discriminator(X), module.eval().discriminator(X))


def test_a_second_part_is_refused_as_checkpoints_hold_one(tmp_path: Path) -> None:
    """Whether there are two callbacks, or one trains after the other."""
    first, second = (MiLoRAInit(r=4, module=part) for part in ("generator", "discriminator"))
    message = "'generator.0' has an adapter already and is outside of module='discriminator'"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[first, second]).fit(Adversarial())
    module = Adversarial()
    fit(module, tmp_path, module="generator")
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[second]).fit(module)


@pytest.mark.parametrize(("name", "message"), [("nothing", "whose parts are: net, judge"), ("net.0", "single layer")])
def test_parts_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject(Judged(), LoRAConfig(r=4, module=name))
    with pytest.raises(TargetNotFoundError, match="exclude_modules names 'teacher'"):
        inject(Judged(), LoRAConfig(r=4, exclude_modules=["teacher"]))


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 4, 1))
    old = nn.utils.spectral_norm(nn.Conv1d(4, 4, 1))
    norms = [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True), nn.BatchNorm1d(4, affine=False)]
    return nn.Sequential(nn.Linear(8, 8), *norms, spectral, old, nn.Dropout(0.5), nn.Linear(8, 8))


class Normed(LightningModule):
    """Layers with statistics, validated in every epoch, which sets modes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.net = normed()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch.view(-1, 4, 8)[:8] * 3 + 1).square().mean()

    validation_step = training_step
    configure_optimizers = Judged.configure_optimizers
    train_dataloader = val_dataloader = Judged.train_dataloader


def test_statistics_of_frozen_layers_stand_still_and_those_that_train_move(tmp_path: Path) -> None:
    module = Normed()
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        module.net(x)  # a pretrained one has statistics
    before = copy.deepcopy(module).eval()
    # The kernel of InstanceNorm of torch 2.10 (2.13 does not) rounds the statistics that it only reads.
    exact = {"rtol": 0.0, "atol": 0.0 if version.parse(torch.__version__) >= version.parse("2.13") else 1e-6}

    class Mode(MiLoRAInit):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.train()
            assert pl_module.net[6].training

    quiet_trainer(tmp_path, callbacks=[Mode(4, cache=False)], max_epochs=3).fit(module)
    with torch.no_grad(), adapters_disabled(module.eval()):
        torch.testing.assert_close(module.net(x), before.net(x), **exact)
        with adapters_disabled(module):
            pass
        torch.testing.assert_close(module.net(x), before.net(x), **exact)
    assert not torch.allclose(module.net(x), before.net(x))
    for clone in (copy.deepcopy(module.net[1]), pickle.loads(pickle.dumps(module.net[1]))):
        assert torch.equal(clone.train()(x), before.net[1](x))
        assert type(clone).__name__ == "BatchNorm1d"

    free = Normed()
    quiet_trainer(tmp_path, callbacks=[MiLoRAInit(4, cache=False, modules_to_save=["1"])], max_epochs=1).fit(free)
    assert free.net[1].num_batches_tracked == 4
    assert free.net[3].num_batches_tracked == 0


@pytest.mark.parametrize("kept", [[], ["1"]])
def test_averaging_does_not_reset_statistics_that_are_frozen(kept: list[str], tmp_path: Path) -> None:
    module = Normed()
    with torch.no_grad():
        module.net(torch.randn(2, 4, 8))
    before = copy.deepcopy(module.state_dict())
    averaging = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    adapters = MiLoRAInit(4, cache=False, modules_to_save=kept)
    trainer = quiet_trainer(tmp_path, callbacks=[averaging, adapters], max_epochs=3)
    trainer.fit(module)
    after = dict(module.named_buffers())
    for name in ("running_mean", "running_var"):
        assert torch.equal(after[f"net.3.{name}"], before[f"net.3.{name}"])
        assert torch.equal(after[f"net.1.{name}"], before[f"net.1.{name}"]) == (not kept)
    torch.optim.swa_utils.update_bn([X.view(-1, 4, 8)], module.net)
    assert torch.equal(module.net[3].running_mean, before["net.3.running_mean"])


def test_statistics_stand_still_where_a_strategy_has_replaced_the_layer(tmp_path: Path) -> None:
    from milora_lightning.adapters.surgery import freeze_again

    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    inject(model, LoRAConfig(r=2))
    initialize(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert model.train()[1].training
    freeze_again(model, LoRAConfig(r=2))
    assert not model.train()[1].training
