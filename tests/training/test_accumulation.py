"""An optimizer step over several batches is that over one large batch, whatever is set around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from milora_lightning import CausalLMModule, MiLoRAInit, lora_layers
from milora_lightning.data.batches.batching import Collator
from milora_lightning.training.accumulation import TokenWindow
from milora_lightning.training.schedules import run_length

# Answers of very different lengths, and one (the last) that is cut off: nothing of it is supervised.
LENGTHS = (1, 40, 2, 25, 0)
WHOLE = [[0, 1, 2, 3]]


class Gradients(Callback):
    """Keeps the gradients that callbacks see before each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]))


class MeanOfMeans(CausalLMModule):
    """What Lightning does by itself."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        LightningModule.backward(self, loss, *args, **kwargs)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("accumulation") / "llama", "llama")


def train(
    model: Path, batches: list[list[int]], kind: type[CausalLMModule] = CausalLMModule, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Train two epochs on batches of the examples of these numbers; return the update and the gradients."""
    generator = torch.Generator().manual_seed(0)
    examples = [
        {"input_ids": torch.randint(4, 128, (8 + length,), generator=generator).tolist(), "prompt_length": 8}
        for length in LENGTHS
    ]
    collate = Collator(0, 8)
    loader = DataLoader([collate([examples[number] for number in batch]) for batch in batches], batch_size=None)
    gradients = Gradients()
    callbacks = [MiLoRAInit(r=2, seed=0), gradients, *options.pop("callbacks", [])]
    lm = kind(
        str(model),
        loss_agg_mode=options.pop("loss_agg_mode", "token-mean"),
        optimizer=options.pop("optimizer", lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)),
        lr_scheduler="constant",
        warmup_steps=0,
    )
    quiet_trainer(model.parent, **{"max_epochs": 2, "callbacks": callbacks, **options}).fit(lm, loader)
    moved = [
        (now - start).detach().flatten()
        for layer in lora_layers(lm).values()
        for now, start in ((layer.lora_A, layer.initial_A), (layer.lora_B, layer.initial_B))
    ]
    return torch.cat(moved), gradients.seen


def distance(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("batches", "whole", "options"),
    [
        ([[0, 1], [2, 3]], WHOLE, {"accumulate_grad_batches": 2}),
        ([[0], [1], [2], [3]], WHOLE, {"accumulate_grad_batches": 4}),
        ([[3], [0, 2], [1]], WHOLE, {"accumulate_grad_batches": 8}),  # the epoch ends before
        ([[0], [1], [2], [3]], [[0, 1, 2], [3]], {"accumulate_grad_batches": 3}),
        ([[0], [1], [2], [3]], [[0, 1], [2]], {"accumulate_grad_batches": 2, "limit_train_batches": 3}),
        ([[0], [1], [2], [3]], WHOLE, {"callbacks": [GradientAccumulationScheduler({0: 4})]}),
        ([[4], [0, 1], [4], [2, 3], [4]], WHOLE, {"accumulate_grad_batches": 5}),
        ([[4], [4]], [[4]], {"accumulate_grad_batches": 2}),
        ([[0, 1], [2, 3]], WHOLE, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01}),
        (
            [[0, 1], [2, 3]],
            WHOLE,
            {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"},
        ),
    ],
)
def test_batches_of_a_step_train_what_one_large_batch_does(
    batches: list[list[int]], whole: list[list[int]], options: dict[str, Any], llama: Path
) -> None:
    """The same updates over two epochs, of the same gradients before they are clipped."""
    one = {k: v for k, v in options.items() if "clip" in k}
    expected, gradients = train(llama, whole, **one)
    got, seen = train(llama, batches, **options)
    assert len(seen) == len(gradients) == 2 * len(whole)
    if expected.any():  # not where nothing is supervised
        assert distance(seen[0], gradients[0]) < 1e-6
        assert all(distance(ours, theirs) < 1e-5 for ours, theirs in zip(seen, gradients, strict=True))
        assert distance(got, expected) < 1e-5
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("batches", [WHOLE, [[0, 1], [2, 3]], [[4], [3], [0, 2], [1]], [[0], [1], [2], [3]]])
def test_each_example_has_the_same_weight_where_losses_are_averaged_by_example(
    batches: list[list[int]], llama: Path
) -> None:
    """A step's gradient is the mean of those of its examples, each trained on alone; an empty one does not count."""
    alone = [train(llama, [[number]], max_epochs=1)[1][0] for number in WHOLE[0]]
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": len(batches)}
    _, (gradient,) = train(llama, batches, loss_agg_mode="seq-mean-token-mean", **options)
    assert distance(gradient, torch.stack(alone).mean(0)) < 1e-5
    _, (by_token,) = train(llama, batches, **options)
    assert distance(gradient, by_token) > 0.05


class Losses(Callback):
    """Keeps the loss that is logged in each step, and the one that the screen would average."""

    def __init__(self) -> None:
        self.logged: list[float] = []
        self.whole: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.step_loss.ended:
            self.logged.append(trainer.callback_metrics["train_loss"].item())
            self.whole.append(pl_module.step_loss.mean.item())


@pytest.mark.parametrize(
    ("batches", "mode"), [([[0, 1], [2, 3]], "token-mean"), ([[4], [3], [0, 2], [1]], "seq-mean-token-mean")]
)
def test_the_loss_that_is_logged_is_that_of_the_whole_step(batches: list[list[int]], mode: str, llama: Path) -> None:
    """That of one large batch, in both of two steps; the last of the small ones has another."""
    one, several, last = Losses(), Losses(), Losses()
    train(llama, WHOLE, callbacks=[one], loss_agg_mode=mode)
    train(llama, batches, callbacks=[several], loss_agg_mode=mode, accumulate_grad_batches=len(batches))
    assert several.logged == several.whole
    assert several.logged == pytest.approx(one.logged, rel=1e-5)
    train(llama, batches[-1:], callbacks=[last], loss_agg_mode=mode, max_epochs=1)
    assert last.logged != pytest.approx(one.logged[:1], rel=1e-3)


def test_the_loss_that_is_logged_is_that_of_all_ranks(llama: Path) -> None:
    """This rank has 2 tokens, the other 8. What trains is this rank's share, whatever strategies sum in place."""
    others = {torch.float32: 32.0, torch.int64: 8}
    lm = CausalLMModule(str(llama))
    strategy = SimpleNamespace(reduce=lambda x, reduce_op: x.add_(others[x.dtype]))
    lm._trainer = cast(Any, SimpleNamespace(strategy=strategy, world_size=2))
    total = torch.tensor(6.0, requires_grad=True)
    loss = lm.mean_over_ranks(total, torch.tensor(2))
    assert loss.item() == pytest.approx(6.0 * 2 / 10)
    assert lm.step_loss.mean.item() == pytest.approx((6.0 + 32.0) / 10)


def test_a_run_begins_with_a_step_of_its_own_wherever_the_last_one_ended(llama: Path) -> None:
    """Such as in the middle of a step, interrupted or out of time."""
    lm = CausalLMModule(str(llama))
    lm.step_loss.add(torch.tensor(90.0), torch.tensor(9))
    lm.on_train_start()
    assert lm.step_loss.add(torch.tensor(6.0), torch.tensor(2)) == 3


def test_evaluation_is_by_token_however_training_averages(llama: Path) -> None:
    lm = CausalLMModule(str(llama), loss_agg_mode="seq-mean-token-mean")
    lm.configure_model()
    labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, -100, 8]])
    batch = {"input_ids": labels.clamp(min=4), "labels": labels}
    assert lm.eval().loss(batch)[1] == 4
    assert lm.train().loss(batch)[1] == 2
    with pytest.raises(ValueError, match="loss_agg_mode must be token-mean or seq-mean-token-mean, not 'mean'"):
        CausalLMModule(str(llama), loss_agg_mode="mean")  # type: ignore[arg-type]


def test_the_mean_of_means_is_another_gradient(llama: Path) -> None:
    expected, _ = train(llama, WHOLE)
    got, _ = train(llama, [[0, 1], [2, 3]], MeanOfMeans, accumulate_grad_batches=2)
    assert distance(got, expected) > 0.05


@pytest.mark.parametrize(
    "precision", [MixedPrecision("bf16-mixed", "cpu"), MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
)
def test_mixed_precision_accumulates_the_same(precision: MixedPrecision, llama: Path) -> None:
    """Scaled losses are weighted before the scaler looks at their gradients; half precision rounds."""
    options: dict[str, Any] = {"plugins": [precision], "gradient_clip_val": 0.01}
    expected, gradients = train(llama, WHOLE, **options)
    got, seen = train(llama, [[4], [0, 1], [2, 3]], accumulate_grad_batches=3, **options)
    assert distance(seen[0], gradients[0]) < 0.02
    assert distance(got, expected) < 0.05


def test_a_window_begins_anew_when_gradients_are_zeroed() -> None:
    """Also where fitting stopped in its middle, as a time limit may."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    window = TokenWindow()
    window.add(torch.tensor(1000))
    window.clear()
    for tokens in (3, 1):
        (parameter * window.add(torch.tensor(tokens))).backward()
    window.average([parameter])
    assert parameter.grad == 1


def test_the_mean_is_over_the_tokens_of_all_ranks() -> None:
    """Averaged over both ranks, the gradients are those of the mean over three and nine tokens."""
    sums, tokens = [torch.tensor(6.0), torch.tensor(9.0)], [torch.tensor(3), torch.tensor(9)]

    def reduced(tensor: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        both = tokens if tensor.dtype == torch.int64 else sums
        return torch.stack(both).sum()

    losses = []
    for rank in range(2):
        module: Any = CausalLMModule("embedded")
        module.trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduced), world_size=2)
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
