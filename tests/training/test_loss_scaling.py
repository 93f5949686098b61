"""Training in float16 needs a scaled loss, and is refused without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.callback_modules import LanguageModel, Regression
from helpers.models import quiet_trainer, save_tiny_model, tiny_model
from helpers.modules import data, module
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision

from milora_lightning import MiLoRAInit
from milora_lightning.models import processor
from milora_lightning.training.loss_scaling import check_loss_scaling
from milora_lightning.utils.errors import InvalidInputError

REFUSED = "compute in float16, where small gradients become zero unless the loss is scaled"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"), "llama")


def scaling() -> MixedPrecision:
    """What precision 16-mixed is on a GPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def test_float16_weights_are_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_fast_products", lambda _: True)  # else a CPU holds them in float32
    half = tmp_path / "half"
    tiny_model("llama", torch.float16).save_pretrained(half)
    for file in base.glob("tok*"):
        (half / file.name).write_bytes(file.read_bytes())
    for lm, folder in ((module(base, dtype="float16"), base), (module(half), half)):
        trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4)], max_steps=1)
        with pytest.raises(InvalidInputError, match=f"{REFUSED}.*'32-true' it is not: set trainer.precision: 16-m"):
            trainer.fit(lm, data(tmp_path, folder))
        assert lm.model is None  # before it is loaded


def test_float16_in_other_modules_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4)])
    with pytest.raises(InvalidInputError, match=REFUSED):
        trainer.fit(LanguageModel(torch.float16))


def test_a_trainer_that_makes_it_float16_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4)], plugins=HalfPrecision("16-true"))
    with pytest.raises(InvalidInputError, match=f"HalfPrecision makes the model {REFUSED}"):
        trainer.fit(Regression())


def test_what_scales_its_loss_itself_or_does_not_train_is_left_alone(base: Path, tmp_path: Path) -> None:
    class Manual(LanguageModel):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.lm(batch[0], labels=batch[0])

    trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4)], max_steps=1, limit_train_batches=1, max_epochs=1)
    trainer.fit(Manual(torch.float16))
    quiet_trainer(tmp_path).validate(module(base, dtype="float16"), data(tmp_path, base), verbose=False)


def test_weights_that_train_in_float16_are_refused_with_scaling_too(base: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, plugins=scaling())
    with pytest.raises(InvalidInputError, match="train in float16 would lose small updates"):
        trainer.fit(module(base, dtype="float16"), data(tmp_path, base))


class Gradients(Callback):
    """Keeps the gradients of the first step, as the optimizer sees them."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 0:
            self.found = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("accumulated", "precision"), [(3, "16-mixed"), (1, "bf16-mixed")])
def test_gradients_on_a_float16_base_are_right(base: Path, tmp_path: Path, accumulated: int, precision: str) -> None:
    """With a scaled loss, or where products are computed in bfloat16."""

    def gradients(plugin: MixedPrecision | None, dtype: str) -> dict[str, torch.Tensor]:
        keeps = Gradients()
        options = {"plugins": plugin} if plugin else {}
        trainer = quiet_trainer(
            tmp_path,
            callbacks=[MiLoRAInit(r=4, cache=False), keeps],
            max_steps=2,
            limit_val_batches=0,
            accumulate_grad_batches=accumulated,
            gradient_clip_val=100.0,
            **options,
        )
        trainer.fit(module(base, dtype=dtype), data(tmp_path, base))
        return keeps.found

    mixed = scaling() if precision == "16-mixed" else MixedPrecision("bf16-mixed", "cpu")
    exact, half = gradients(None, "float32"), gradients(mixed, "float16")
    assert exact.keys() == half.keys()
    for name, gradient in exact.items():
        # But for the signs of singular vectors, which are free
        assert (half[name].abs() - gradient.abs()).norm() <= 0.05 * gradient.norm(), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_products_in_bfloat16_need_no_scaling_whatever_the_weights_are(precision: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, precision=precision)
    if precision == "32-true":
        with pytest.raises(InvalidInputError, match=REFUSED):
            check_loss_scaling(trainer, Regression(), computes_in_float16=True)
    else:
        check_loss_scaling(trainer, Regression(), computes_in_float16=True)


@pytest.mark.parametrize(
    ("plugin", "computes", "said"),
    [
        ({"precision": "32-true"}, False, None),
        ({"precision": "32-true"}, True, "The model is loaded to compute in float16"),
        ({"precision": "16-true"}, False, "SimpleNamespace makes the model compute in float16"),
        ({"precision": "own", "dtype": torch.float16}, False, "SimpleNamespace makes the model"),
        ({"precision": "own", "dtype": torch.bfloat16}, False, None),
        ({"precision": "16-mixed", "scaler": object()}, True, None),
        ({"precision": "bf16-mixed"}, True, None),
    ],
)
def test_float16_without_scaling_is_refused_whoever_asks_for_it(
    plugin: dict[str, Any], computes: bool, said: str | None
) -> None:
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(**plugin))
    module: Any = SimpleNamespace(automatic_optimization=True)
    if said is None:
        check_loss_scaling(trainer, module, computes)
        return
    with pytest.raises(ValueError, match=said):
        check_loss_scaling(trainer, module, computes)
    module.automatic_optimization = False  # it may scale the loss itself
    check_loss_scaling(trainer, module, computes)
