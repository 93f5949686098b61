"""MiLoRAInit in other people's Lightning projects, through a Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.callback_modules import LanguageModel, Regression
from helpers.exports import IDS, logits, tuned
from helpers.models import quiet_trainer, tiny_model
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelPruning
from lightning.pytorch.demos import transformer as demo
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from milora_lightning import LoRAConfig, MiLoRAInit, export_peft, initialize, inject, lora_layers
from milora_lightning.callbacks._display import _largest_change


class Recorder(Callback):
    """Keeps parameters and an output as they are before and after surgery, and at the end."""

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs = inputs

    def _output(self, module: LightningModule) -> Tensor:
        torch.manual_seed(7)
        with torch.no_grad():
            return module(*self.inputs)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before MiLoRAInit's turn the adapters are zero: the module's own output.
        self.before = self._output(pl_module.eval())
        pl_module.train()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.eval()
        self.after = self._output(pl_module)
        pl_module.train()
        self.start = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.changed = {n for n, p in pl_module.named_parameters() if not torch.equal(p, self.start[n])}
        self.dtypes = {p.dtype for p in pl_module.parameters() if p.requires_grad}


class RandomTokens(Dataset):  # type: ignore[type-arg]
    """Takes the place of the demo's data set, which would be downloaded."""

    def __init__(self, download: bool = False) -> None:
        self.tokens = torch.randint(0, 50, (32, 9), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index, :-1], self.tokens[index, 1:]


def modules() -> dict[str, tuple[LightningModule, tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 8))
    return {
        "__init__ (Lightning's demo transformer)": (demo.LightningTransformer(vocab_size=50), (ids, ids)),
        "setup": (Regression(), (torch.randn(5, 12),)),
        "configure_model": (LanguageModel(), (ids,)),
    }


@pytest.mark.parametrize("where", list(modules()))
@pytest.mark.parametrize("init", ["milora", "lora"])
def test_unmodified_modules_train_only_adapters(
    where: str, init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "WikiText2", RandomTokens)
    module, inputs = modules()[where]
    untouched = copy.deepcopy(module)
    untouched.setup("fit")
    untouched.configure_model()
    recorder = Recorder(*inputs)
    quiet_trainer(tmp_path, callbacks=[recorder, MiLoRAInit(r=8, init=init)], max_steps=20).fit(module)
    names = {f"{name}.{factor}" for name in lora_layers(module) for factor in ("lora_A", "lora_B")}
    assert len(names) >= 4
    assert {name for name, p in module.named_parameters() if p.requires_grad} == names
    assert recorder.changed == names
    before = recorder._output(untouched.eval())
    torch.testing.assert_close(recorder.after, before, rtol=1e-5, atol=1e-6)
    if where != "__init__ (Lightning's demo transformer)":  # whose weights are read, not called
        assert torch.equal(recorder.after, before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_adapters_gradients_and_optimizer_stay_in_float32(precision: str, tmp_path: Path) -> None:
    module = LanguageModel(torch.float32 if precision == "bf16-mixed" else torch.bfloat16)
    seen: set[torch.dtype] = set()

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            seen.update(p.grad.dtype for p in pl_module.parameters() if p.requires_grad)

    recorder = Recorder(torch.randint(0, 128, (2, 8)))
    callbacks = [recorder, MiLoRAInit(r=8, lora_dropout=0.1), Gradients()]
    trainer = quiet_trainer(
        tmp_path, callbacks=callbacks, max_steps=20, precision=precision, accumulate_grad_batches=2, max_epochs=9
    )
    trainer.fit(module)
    state = trainer.optimizers[0].state
    assert trainer.global_step == 20
    assert recorder.dtypes == seen == {torch.float32}
    assert len(state) == len(recorder.changed) > 0
    assert {v.dtype for entry in state.values() for k, v in entry.items() if k != "step"} == {torch.float32}
    assert all(name.endswith(("lora_A", "lora_B")) for name in recorder.changed)
    if precision != "bf16-mixed":
        assert module.lm.transformer.h[0].attn.c_attn.base_layer.weight.dtype == torch.bfloat16
        assert torch.equal(recorder.before, recorder.after)


def test_everything_may_be_called_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fit, validate, test, predict and fit again, with one callback or a new one: one surgery in all."""
    module = Regression()
    callback = MiLoRAInit(r=4)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_steps=3)
    trainer.validate(module, verbose=False)
    assert all(not layer.initialized for layer in lora_layers(module).values())
    trainer.fit(module)
    layers = lora_layers(module)
    initial = {name: layer.initial_A.clone() for name, layer in layers.items()}
    trainer.validate(module, verbose=False)
    trainer.test(module, verbose=False)
    first = torch.cat(trainer.predict(module))
    again = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4)], max_steps=3)
    assert torch.equal(torch.cat(again.predict(module)), first)
    again.fit(module)
    assert lora_layers(module) == layers
    assert all(torch.equal(layer.initial_A, initial[name]) for name, layer in layers.items())
    assert not torch.equal(torch.cat(again.predict(module)), first)
    assert "configure_model" not in vars(module)
    assert capsys.readouterr().out.count("Adapters initialized") == 1


def test_summary_gives_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4, lora_alpha=8)], max_steps=1).fit(Regression())
    printed = capsys.readouterr().out
    trainable = 4 * (12 + 24) + 4 * (24 + 10)
    total = 12 * 24 + 24 + 2 * 24 + 24 * 10 + 10 + trainable
    assert "Adapters initialized: milora" in printed
    assert f"{trainable} of {total} ({trainable / total:.2%})" in printed
    assert "4, 8, 0" in printed
    assert [line.split("│")[2].strip() for line in printed.splitlines() if "largest change" in line] == ["0"]


def test_the_summary_s_largest_change_is_that_of_the_outputs() -> None:
    """Of layers that have been changed, and of base layers that it need not call."""
    module = Regression()
    module.setup("fit")
    inject(module, LoRAConfig(r=4, lora_alpha=8))
    initialize(module)
    assert _largest_change(module) == 0
    x = {n: torch.randn(4, n, generator=torch.Generator().manual_seed(0)) for n in (12, 24)}
    for layer in lora_layers(module).values():
        layer.lora_B.data.add_(1.0)
    with torch.no_grad():
        changes = [
            (layer(x[layer.in_features]) - layer.base_layer(x[layer.in_features])).abs().max()
            for layer in lora_layers(module).values()
        ]
    assert _largest_change(module) == pytest.approx(float(max(changes)), rel=1e-5)


def test_dropout_is_on_in_training_although_the_model_came_in_eval_mode(tmp_path: Path) -> None:
    module = LanguageModel()
    modes: list[bool] = []

    class Modes(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            modes.extend(layer.training for layer in lora_layers(pl_module).values())

    quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4, lora_dropout=0.1), Modes()], max_steps=1).fit(module)
    assert modes
    assert all(modes)
    assert not module.lm.transformer.drop.training


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ({"target_modules": ["nowhere"]}, "'nowhere' matches no linear layer"),
        ({"r": 8}, r"r=8 is larger than layer 'layer' allows, whose weight is 2×32"),
    ],
)
def test_bad_targets_stop_before_training(callback: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, callbacks=[MiLoRAInit(**callback)], max_steps=1).fit(BoringModel())


def test_learning_rate_finder_works_before_training(tmp_path: Path) -> None:
    module = Regression()
    module.lr = 1e-3
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=module.lr)
    finder = LearningRateFinder(num_training_steps=12)
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[MiLoRAInit(r=4), finder], enable_checkpointing=True)
    trainer.fit(module)
    assert len(finder.optimal_lr.results["loss"]) > 5
    assert trainer.global_step == 2


@pytest.mark.parametrize("first", [True, False])
def test_pruning_is_refused(first: bool, tmp_path: Path) -> None:
    callbacks = [MiLoRAInit(r=2), ModelPruning("l1_unstructured", amount=0.5)]
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks if first else callbacks[::-1])
    with pytest.raises(ValueError, match="ModelPruning does not work with MiLoRAInit"):
        trainer.fit(BoringModel())


class Taught(LightningModule):
    """A student and its teacher, which are the same model at first."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = tiny_model(), tiny_model()

    def predict_step(self, batch: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        return self.teacher(batch).logits, self.student(batch).logits

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(IDS, batch_size=len(IDS))  # type: ignore[arg-type]


def test_one_part_of_a_module_continues_from_an_adapter(tmp_path: Path) -> None:
    model = tuned(tmp_path / "base")
    export_peft(model, tmp_path / "peft")
    module, callback = Taught(), MiLoRAInit(start_from=str(tmp_path / "peft"), module="student")
    ((teacher, student),) = quiet_trainer(tmp_path, callbacks=[callback]).predict(module)
    torch.testing.assert_close(student, logits(model), rtol=0, atol=1e-5)
    assert torch.equal(teacher, logits(tiny_model()))
    assert not torch.allclose(student, teacher, atol=1e-2)
    assert {name.partition(".")[0] for name in lora_layers(module)} == {"student"}
    assert all(parameter.requires_grad for parameter in module.teacher.parameters())
