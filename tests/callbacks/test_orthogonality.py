"""Updates stay out of the protected subspace, whatever the optimizer; without protection they don't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model
from helpers.modules import data, module
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from milora_lightning import (
    CausalLMModule,
    LoRAConfig,
    MiLoRAInit,
    PrincipalProjection,
    SFTDataModule,
    SubspaceMonitor,
    inject,
    lora_layers,
)
from milora_lightning.callbacks.orthogonality import _bases
from milora_lightning.cli.main import CONFIGS, MiLoRACLI

P = 8
OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "llama", "llama")


def fit(folder: Path, model: Path, *callbacks: Callback, optimizer: str = "adamw", **adapter: Any) -> CausalLMModule:
    options = {"max_steps": 10, "num_sanity_val_steps": 0, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    adapter = {"r": 4, "lora_dropout": 0.1, "seed": 0, **adapter}
    trainer = quiet_trainer(folder, callbacks=[MiLoRAInit(**adapter), *callbacks], **options)
    torch.manual_seed(0)
    lm = module(model, optimizer=OPTIMIZERS[optimizer])
    trainer.fit(lm, data(folder, model))
    return lm


def inside(lm: LightningModule, p: int) -> float:
    """The largest share of any ‖ΔW‖ that lies in the first p left or right singular directions of its weight."""
    shares = []
    for layer in lora_layers(lm).values():
        delta = layer.delta_weight().detach().double()
        U, _, Vh = torch.linalg.svd(layer.base_layer.weight.detach().double())
        shares += [(x.norm() / delta.norm()).item() for x in (U[:, :p].T @ delta, delta @ Vh[:p].T)]
        assert delta.norm() > 1e-4 * layer.base_layer.weight.norm()
    return max(shares)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_updates_stay_out_of_the_principal_subspace(optimizer: str, llama: Path, tmp_path: Path) -> None:
    assert inside(fit(tmp_path, llama, PrincipalProjection(P), optimizer=optimizer), P) < 1e-5
    assert inside(fit(tmp_path, llama, optimizer=optimizer), P) > 0.1  # without protection


def test_a_run_that_breaks_off_leaves_no_protection_behind(tmp_path: Path) -> None:
    class Breaking(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(12, 12)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            assert self.net.lora_A._backward_hooks
            raise OSError("a file of the user's")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(torch.zeros(1))

    broken, callbacks = Breaking(), [MiLoRAInit(r=2), PrincipalProjection(4)]
    with pytest.raises(OSError, match="of the user's"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=callbacks).fit(broken)
    (layer,) = lora_layers(broken).values()
    assert not layer.lora_A._backward_hooks
    assert not layer.lora_B._backward_hooks


def test_everything_but_the_trained_slice_can_be_protected(llama: Path, tmp_path: Path) -> None:
    lm = fit(tmp_path, llama, PrincipalProjection(10_000))
    for layer in lora_layers(lm).values():
        delta = layer.delta_weight().detach().double()
        U, _, Vh = torch.linalg.svd(layer.base_layer.weight.detach().double())
        k = min(layer.out_features, layer.in_features)
        assert (U[:, : k - 4].T @ delta).norm() < 1e-5 * delta.norm()
        assert (delta @ Vh[: k - 4].T).norm() < 1e-5 * delta.norm()
        assert (U[:, k - 4 :].T @ delta @ Vh[k - 4 :].T).norm() == pytest.approx(delta.norm().item(), rel=1e-4)


def test_lora_is_projected_at_the_start_and_starts_at_the_base_model(llama: Path, tmp_path: Path) -> None:
    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for layer in lora_layers(pl_module).values():
                assert not layer.delta_weight().any()

    lm = fit(tmp_path, llama, PrincipalProjection(P), Start(), init="lora")
    assert inside(lm, P) < 1e-5


def test_what_is_frozen_stays_and_the_rest_is_projected(llama: Path, tmp_path: Path) -> None:
    lm = fit(tmp_path, llama, PrincipalProjection(P), init="mica")
    assert inside(lm, P) < 1e-5
    for layer in lora_layers(lm).values():
        U = torch.linalg.svd(layer.base_layer.weight.detach().double())[0][:, : min(layer.base_layer.weight.shape)]
        torch.testing.assert_close(U[:, -4:] @ U[:, -4:].T @ layer.lora_B.double(), layer.lora_B.double())


def test_milora_starts_bit_for_bit_at_its_initial_factors(llama: Path, tmp_path: Path) -> None:
    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for layer in lora_layers(pl_module).values():
                assert torch.equal(layer.lora_A, layer.initial_A)
                assert torch.equal(layer.lora_B, layer.initial_B)

    fit(tmp_path, llama, PrincipalProjection(P), Start())


def test_what_an_optimizer_sees_is_free_of_the_protected_directions(llama: Path, tmp_path: Path) -> None:
    shares: list[float] = []

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            for layer in lora_layers(pl_module).values():
                U, _, Vh = torch.linalg.svd(layer.base_layer.weight.double())
                for gradient, protected in ((layer.lora_A.grad, Vh[:P].T), (layer.lora_B.grad.T, U[:, :P])):
                    shares.append(((gradient.double() @ protected).norm() / gradient.norm()).item())

    fit(tmp_path, llama, Gradients(), PrincipalProjection(P))
    assert max(shares) < 1e-5
    shares.clear()
    fit(tmp_path, llama, Gradients())
    assert min(max(shares[::2]), max(shares[1::2])) > 0.1  # of A, and of B


def test_nothing_is_left_behind(llama: Path, tmp_path: Path) -> None:
    lm = fit(tmp_path, llama, PrincipalProjection(P))
    layer = next(iter(lora_layers(lm).values()))
    assert not layer.lora_A._backward_hooks
    assert not lm.trainer.optimizers[0]._optimizer_step_post_hooks


def test_mistakes_are_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"initial factors of layer 'model.*init='pissa'.*init milora, mica or lora"):
        fit(tmp_path, llama, PrincipalProjection(P), init="pissa")
    with pytest.raises(ValueError, match=r"no direction besides the r=16"):
        fit(tmp_path, llama, PrincipalProjection(P), r=16, target_modules=["k_proj"])
    trainer = quiet_trainer(tmp_path, strategy=ModelParallelStrategy())
    for callback in (PrincipalProjection(P), SubspaceMonitor()):
        with pytest.raises(ValueError, match=f"{type(callback).__name__} needs whole weights, and ModelParallel"):
            callback.setup(trainer, module(llama), "fit")
    with pytest.raises(ValueError, match="p must be at least 1"):
        PrincipalProjection(0)


def test_convolutions_of_several_groups_are_refused_by_name() -> None:
    model = nn.ModuleDict({"plain": nn.Conv2d(4, 6, 3), "grouped": nn.Conv2d(4, 6, 3, groups=2)})
    inject(model, LoRAConfig(r=2, target_modules=["plain", "grouped"]))
    layers = lora_layers(model)
    U, V = _bases("plain", layers["plain"], 3)
    assert (U.shape, V.shape) == ((6, 3), (36, 3))
    with pytest.raises(ValueError, match="cannot protect 'grouped', a convolution of several groups"):
        _bases("grouped", layers["grouped"], 3)


def test_overlay_adds_it_to_the_callbacks_there_are() -> None:
    args = [x for name in ("milora.yaml", "method/milora-strict.yaml") for x in ("--config", str(CONFIGS / name))]
    cli = MiLoRACLI(CausalLMModule, SFTDataModule, args=args, run=False, save_config_callback=None)
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert kinds.count(PrincipalProjection) == 1
    assert kinds.count(ModelCheckpoint) == 2
