"""Losses over ranks, and small decisions of training, with trainers that are imitated."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from milora_lightning import CausalLMModule
from milora_lightning.training import loading
from milora_lightning.training.loss_scaling import check_loss_scaling
from milora_lightning.training.optimizers import full_path
from milora_lightning.training.schedules import check_schedule, run_length


def test_the_mean_is_over_the_tokens_of_all_ranks() -> None:
    """Averaged over both ranks, the gradients are those of the mean over three and nine tokens."""
    sums, tokens = [torch.tensor(6.0), torch.tensor(9.0)], [torch.tensor(3), torch.tensor(9)]

    def reduced(tensor: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        both = tokens if tensor.dtype == torch.int64 else sums
        return torch.stack(both).sum()

    losses = []
    for rank in range(2):
        module = CausalLMModule("embedded")
        module.trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduced), world_size=2)  # type: ignore
        losses.append(module.mean_over_ranks(sums[rank], tokens[rank]))
        assert module.step_loss.mean == pytest.approx(15 / 12)
    assert torch.stack(losses).mean() == pytest.approx(15 / 12)


@pytest.mark.parametrize(
    ("factors", "epochs", "most", "length"),
    [
        ({0: 2}, 3, -1, 12),  # 7 batches: 4 steps an epoch
        ({0: 1, 2: 4}, 3, -1, 7 + 7 + 2),
        ({0: 2}, 3, 5, 5),
        ({0: 2}, 3, 99, 12),
    ],
)
def test_a_run_is_as_long_as_its_accumulated_batches_and_no_longer_than_it_may(
    factors: dict[int, int], epochs: int, most: int, length: int
) -> None:
    trainer: Any = SimpleNamespace(
        limit_train_batches=1.0,
        estimated_stepping_batches=21,
        max_epochs=epochs,
        max_steps=most,
        num_training_batches=7,
        callbacks=[GradientAccumulationScheduler(factors)],
    )
    assert run_length(trainer) == length
    trainer.limit_train_batches = 0
    assert run_length(trainer) == 0


def test_a_schedule_like_none_there_is_has_no_suggestion() -> None:
    with pytest.raises(ValueError, match=r"no lr_scheduler 'xyz'\. Known are: linear, cosine, "):
        check_schedule("xyz", 0, {})
    with pytest.raises(ValueError, match=r"'linearr'; did you mean 'linear'\? Known are"):
        check_schedule("linearr", 0, {})


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


@pytest.mark.parametrize(
    ("dtype", "adapters", "quantized", "held"),
    [
        ("fast", True, False, True),
        ("auto", True, False, "auto" in loading.CHOSEN),
        ("bfloat16", True, False, False),
        ("fast", False, False, False),
        ("fast", True, True, False),
    ],
)
def test_weights_are_held_in_float32_where_the_dtype_is_ours_to_choose(
    dtype: str, adapters: bool, quantized: bool, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(loading, "hold_in_float32", lambda model, device: done.append(model))
    monkeypatch.setattr(loading, "warn_of_slow_products", lambda dtype: None)
    module = CausalLMModule("embedded", dtype=dtype)
    module.milora_config = object() if adapters else None  # type: ignore[assignment]
    monkeypatch.setattr(type(module), "_is_fitting", True)
    model = tiny_model("llama")
    model.is_quantized = quantized
    module._suit_processor(model, torch.device("cpu"))
    assert done == ([model] if held else [])


def test_optimizers_of_libraries_that_are_missing_are_named_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name in ("PagedAdamW", "AdamW8bit"):
        with pytest.raises(ValueError, match=f"{name} needs the package bitsandbytes"):
            full_path(name)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_results_have_the_name_of_their_stage(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, logged = CausalLMModule("embedded"), dict[str, Any]()
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn="testing"))  # type: ignore
    module.eval_loss.update(torch.tensor(6.0), torch.tensor(3))
    {"val": module.on_validation_epoch_end, "test": module.on_test_epoch_end}[stage]()
    assert {name: value.item() for name, value in logged.items()} == {
        f"{stage}_loss": 2,
        f"{stage}_perplexity": pytest.approx(math.exp(2)),
    }
