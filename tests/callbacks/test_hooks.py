"""What callbacks do in the hooks of a run, hook by hook, without a Trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from milora_lightning import (
    EvaluationSummary,
    LoRAConfig,
    PrincipalProjection,
    SubspaceMonitor,
    initialize,
    inject,
    lora_layers,
    register_start,
)

PROTECTED = 3


def adapted(init: str = "milora") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    inject(model, LoRAConfig(r=2, init=init))
    initialize(model)
    return model


def one_process(**options: Any) -> Any:
    strategy = SimpleNamespace(broadcast=lambda value: value)
    always = {"is_global_zero": True, "world_size": 1, "strategy": strategy, "optimizers": [], "loggers": []}
    return SimpleNamespace(**{**always, **options})


@torch.no_grad()
def protected_share(model: nn.Module) -> float:
    """The larger of the shares of A and B in the first directions of the weight."""
    (layer,) = lora_layers(model).values()
    U, _, Vh = torch.linalg.svd(layer.base_layer.weight)
    rows = ((layer.lora_A, Vh[:PROTECTED].T), (layer.lora_B.mT, U[:, :PROTECTED]))
    return max(float((each @ basis).norm() / each.norm().clamp(min=1e-12)) for each, basis in rows)


@pytest.mark.parametrize("init", ["lora", "milora", "mica"])
def test_factors_are_outside_the_protected_directions_from_the_first_forward_on(init: str) -> None:
    model = adapted(init)
    assert (protected_share(model) > 0.1) == (init == "lora")
    PrincipalProjection(PROTECTED).on_fit_start(one_process(), model)
    assert protected_share(model) < 1e-5


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_in_the_protected_directions_is_refused(frozen: Any) -> None:
    """It would stay there, as nothing projects it."""

    @register_start("largest", frozen=frozen, zero_product=True)
    def largest(W: Tensor, r: int, *_: object) -> tuple[Tensor, Tensor]:
        U, _, Vh = torch.linalg.svd(W)
        factors = {"lora_A": torch.zeros(r, W.shape[1]), "lora_B": torch.zeros(W.shape[0], r)}
        factors[frozen] = {"lora_A": Vh[:r], "lora_B": U[:, :r]}[frozen]
        return factors["lora_A"], factors["lora_B"]

    with pytest.raises(ValueError, match=r"layer '0' \(init='largest'\) lie in the subspace"):
        PrincipalProjection(PROTECTED).on_fit_start(one_process(), adapted("largest"))


@pytest.mark.parametrize(
    ("start", "steps", "measured"),
    [(0, [0, 1, 1, 2, 2, 3, 3, 4], [2, 4]), (2, [2, 2, 3, 4, 4], [4])],
    ids=["from the start", "resumed at a step that was measured"],
)
def test_a_step_of_several_batches_is_measured_once(start: int, steps: list[int], measured: list[int]) -> None:
    model, logged = adapted(), []
    (layer,) = lora_layers(model).values()
    with torch.no_grad():
        layer.lora_B.add_(0.1)
    monitor = SubspaceMonitor(every_n_steps=2, k=2)
    monitor.on_train_start(one_process(global_step=start), model)
    for step in steps:
        model.log_dict = lambda values, step=step, **_: logged.append((step, values))
        monitor.on_train_batch_end(one_process(global_step=step), model, None, None, 0)
    assert [step for step, _ in logged] == measured
    assert all(values == monitor.measure(model) for _, values in logged)


def records(*prompts: str, generation: str) -> dict[str, Any]:
    same = {"instruction": "", "reference": "", "generation": generation}
    return {"answers": [{"prompt": prompt, **same} for prompt in prompts]}


class Runs:
    """Calls the hooks of a summary as a Trainer does."""

    def __init__(self, summary: EvaluationSummary) -> None:
        loop = SimpleNamespace(verbose=False)
        loops = {"validate_loop": loop, "test_loop": loop}
        fit = SimpleNamespace(epoch_loop=SimpleNamespace(val_loop=loop))
        self.summary, self.trainer = summary, one_process(global_step=4, fit_loop=fit, **loops)
        vars(self.trainer).update(num_sanity_val_batches=[1], num_val_batches=[1], sanity_checking=False)

    def evaluate(self, fn: str, outputs: Any, loss: float, sanity: bool = False) -> None:
        stage = "test" if fn == "test" else "val"
        self.trainer.state, self.trainer.sanity_checking = SimpleNamespace(fn=fn), sanity
        self.trainer.callback_metrics = {f"{stage}_loss": torch.tensor(loss)}
        kind = "test" if fn == "test" else "validation"
        getattr(self.summary, f"on_{kind}_start")(self.trainer, None)
        getattr(self.summary, f"on_{kind}_batch_end")(self.trainer, None, outputs, None, 0)
        getattr(self.summary, f"on_{kind}_end")(self.trainer, None)
        if sanity:
            self.summary.on_sanity_check_end(self.trainer, None)


def test_what_comes_before_training_is_no_result_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    summary = EvaluationSummary(samples=2)
    runs = Runs(summary)
    runs.evaluate("fit", records("1?", "2?", generation="first"), 3.0, sanity=True)
    assert (summary.before, summary.after) == ({"val_loss": 3.0}, {})
    assert capsys.readouterr().out == ""
    runs.evaluate("fit", records("1?", "2?", generation="later"), 2.0)
    assert (summary.before, summary.after) == ({"val_loss": 3.0}, {"val_loss": 2.0})
    assert [(sample["before"], sample["after"]) for sample in summary.shown] == [("first", "later")] * 2
    runs.evaluate("validate", records("1?", "2?", generation="of a checkpoint"), 1.0)
    assert {sample["after"] for sample in summary.shown} == {"later"}
    restored = EvaluationSummary()
    restored.load_state_dict(summary.state_dict())
    assert restored.state_dict() == summary.state_dict()


@pytest.mark.parametrize("fn", ["validate", "test"])
def test_an_evaluation_shows_its_own_answers_and_results(fn: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(EvaluationSummary(samples=3))
    runs.evaluate("validate", records("1?", "2?", generation="of another"), 3.25)
    capsys.readouterr()
    runs.evaluate(fn, records("3?", generation="its own"), 0.0)
    shown = capsys.readouterr().out
    assert "its own" in shown
    assert "of another" not in shown
    assert "loss" in shown
    assert "3.25" not in shown
