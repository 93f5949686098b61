"""Statistics of data: what counts, what is shared, what fits, and what a module may look like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.starting import token_batches
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from milora_lightning import LoRAConfig, collect_statistics, initialize, inject, lora_layers
from milora_lightning.starts import Statistics
from milora_lightning.statistics import ranks_by_variance
from milora_lightning.statistics.collecting import in_groups, layers_with_needs
from milora_lightning.statistics.gradients import SCALE
from milora_lightning.statistics.moments import Moments
from milora_lightning.statistics.passes import Pass, counted_rows


class Attention(nn.Module):
    """Layers that share their inputs, and others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.up, self.down = nn.Linear(8, 10, bias=False), nn.Linear(10, 6)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        y = self.down(self.up(self.q(x) * self.k(x)).relu())
        return y if labels is None else {"loss": ((y - labels) ** 2 * attention_mask[..., None]).sum()}


def batches(number: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(number):
        x, labels = (torch.randn(2, 5, 6, generator=generator) for _ in range(2))
        mask = torch.ones(2, 5, dtype=torch.long)
        mask[1, 3:] = 0
        made.append({"x": x + 1, "attention_mask": mask, "labels": labels})
    return made


def adapted(init: str = "eva") -> Attention:
    model = Attention()
    inject(model, LoRAConfig(r=2, init=init))
    return model


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokens that count, at each layer."""
    model = Attention()
    with torch.no_grad():
        up = model.q(batch["x"]) * model.k(batch["x"])
        each = {"q": batch["x"], "up": up, "down": model.up(up).relu()}
    return {name: x[batch["attention_mask"] == 1].double() for name, x in each.items()}


def test_moments_are_those_of_the_tokens_that_count() -> None:
    data = batches()
    for batch in data:
        batch["x"][batch["attention_mask"] == 0] = torch.nan  # whatever padding holds
    found = collect_statistics(adapted(), data)
    whole = [inputs(batch) for batch in data]
    for name in ("q", "up", "down"):
        X = torch.cat([each[name] for each in whole])
        torch.testing.assert_close(found[name].inputs.double(), X.T @ X / len(X), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name].mean.double(), X.mean(0), rtol=1e-5, atol=1e-6)
        assert found[name].inputs.dtype == torch.float32
    assert found["q"].inputs is found["k"].inputs  # measured once, as they read the same tensor
    with_padding = collect_statistics(adapted(), [{"x": batch["x"]} for batch in batches()])
    assert (with_padding["q"].inputs - found["q"].inputs).norm() > 0.01


def test_tokens_are_counted_beyond_what_float32_can() -> None:
    moments = Moments(2, torch.device("cpu"))
    moments.count += 2**24
    moments.add(torch.ones(1, 2))
    assert moments.count.item() == 2**24 + 1


def test_gradients_are_autograds_and_nothing_gets_a_grad() -> None:
    data, reference = batches(), Attention()
    for batch in data:
        (reference(**batch)["loss"] / len(data)).backward()
    model = adapted("lora_one")
    model.down.base_layer.bias.requires_grad_()  # as what trains in full
    found = collect_statistics(model, data)
    for name in ("q", "k", "up", "down"):
        torch.testing.assert_close(found[name].gradient, getattr(reference, name).weight.grad, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_do_not_vanish_in_half_precision() -> None:
    found = {}
    for dtype in (torch.float32, torch.float16):
        model = adapted("lora_one").to(dtype)
        data = [{"x": batch["x"].to(dtype), "labels": batch["labels"]} for batch in batches()]
        small = lambda batch, model=model: 3e-6 * ((model(batch["x"]).float() - batch["labels"]) ** 2).mean()  # noqa: E731
        found[dtype] = collect_statistics(model, data, small)
    for name, each in found[torch.float32].items():
        assert (found[torch.float16][name].gradient - each.gradient).norm() < 0.1 * each.gradient.norm()


@pytest.mark.parametrize("needs", [("inputs",), ("inputs", "preserved"), ("gradient",)])
def test_several_passes_give_what_one_does(needs: Any) -> None:
    model = adapted("sc_lora")
    layers, _ = layers_with_needs(model)
    over = Pass(model, batches(), lambda batch: model(**batch), lambda batch: batch, torch.device("cpu"))
    groups = list(in_groups(layers, needs, over, batches(1), room=500))
    (once,) = in_groups(layers, needs, over, batches(1), room=2**40)
    assert len(groups) > 1
    together = {name: each for group in groups for name, each in group.items()}
    assert list(together) == list(once)
    for name, each in together.items():
        for one, other in zip(each, once[name], strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_shares_of_ranks_add_up(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five batches for two ranks: one of them runs a batch in the last round that does not count."""
    data = batches(5)
    whole = collect_statistics(adapted(init), data)
    sums: list[list[Tensor]] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, *_: sums[-1].append(tensor.clone()))
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda found, error: None)
    for number in range(2):
        sums.append([])
        collect_statistics(adapted(init), data, number=number, size=2)
    room, *parts = [one + other for one, other in zip(*sums, strict=True)]
    assert room.ndim == 0
    if init == "lora_ga":
        assert parts.pop().tolist() == [2] * len(whole)  # both have reached all layers
        found = dict(zip(whole, (part / SCALE / len(data) for part in parts), strict=True))
        expected = {name: each.gradient for name, each in whole.items()}
    else:
        thirds = zip(parts[::3], parts[2::3], strict=True)
        found = dict(zip(("q", "up", "down"), (products / count for products, count in thirds), strict=True))
        expected = {name: whole[name].inputs for name in found}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_models_in_any_layout_and_mode(kind: str) -> None:
    model = tiny_model(kind).train()
    inject(model, LoRAConfig(r=2, init="lora_null"))
    found = collect_statistics(model, token_batches())
    assert model.training
    distinct = {id(each.inputs) for each in found.values()}
    assert len(distinct) == {"llama": 2 * 4, "gpt2": 2 * 4}[kind]  # before and behind attention, and in the MLP
    assert initialize(model, statistics=found, cache=False) == len(found)


def test_layers_that_are_to_be_adapted_are_measured_without_adapters() -> None:
    config = LoRAConfig(r=2, init="eva")
    found = collect_statistics(Attention(), batches(), config=config)
    after = collect_statistics(adapted(), batches())
    assert all(torch.equal(found[name].inputs, after[name].inputs) for name in after)
    ranks = ranks_by_variance(found, r=2, rho=2.0)
    assert sum(ranks.values()) == 2 * len(found)
    assert max(ranks.values()) <= 4
    inject(model := Attention(), LoRAConfig(r=2, init="eva", rank_pattern=ranks))
    assert initialize(model, statistics=found, cache=False) == 4


def test_ranks_go_where_they_explain_most() -> None:
    def with_spectrum(*values: float) -> Statistics:
        Q, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(len(values))))
        return Statistics((Q * torch.tensor([*values, *[0.0] * (6 - len(values))])) @ Q.T)

    told = {"one": with_spectrum(1.0), "three": with_spectrum(5.0, 4.0, 3.0), "flat": with_spectrum(*[1.0] * 6)}
    assert ranks_by_variance(told, r=2) == {"one": 1, "three": 3, "flat": 2}
    assert ranks_by_variance(told, r=2, rho=1.0) == {"one": 2, "three": 2, "flat": 2}
    with pytest.raises(ValueError, match="at least 1"):
        ranks_by_variance(told, r=0)
    with pytest.raises(ValueError, match="no statistics of the inputs of layer 'a'"):
        ranks_by_variance({"a": Statistics()}, r=1)


class Loose(Attention):
    """A module that calls a layer never, or with the inputs of others now and then."""

    def __init__(self, never: bool) -> None:
        super().__init__()
        self.never, self.calls = never, 0

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        self.calls += 1
        if self.never:
            return self.down(self.up(self.q(x)))
        return self.down(self.up(self.q(x) * self.k(x if self.calls < 3 else x + 0)))


@pytest.mark.parametrize(
    ("model", "init", "data", "message"),
    [
        (Loose(True), "eva", batches(), "Nothing reaches layer 'k'"),
        (Loose(False), "eva", batches(), "Layers 'q' and 'k' have the same inputs for some batches only"),
        (Attention(), "eva", [], "no batch"),
        (Attention(), "milora", batches(), "takes nothing from data"),
        (Attention(), "sc_lora", batches(), "say which text"),
        (Attention(), "lora_ga", [{"x": torch.randn(2, 6)}], "method start_loss"),
        (Attention(), "eva", [{**batches(1)[0], "attention_mask": torch.zeros(2, 5)}], "No token"),
        (nn.Sequential(nn.Conv1d(6, 6, 2)), "eva", batches(), r"Layer '0' \(Conv1d\) is no linear layer"),
        (nn.Sequential(nn.Linear(6, 3)), "lora_ga", batches(), "set its rank to 1 at most"),
    ],
)
def test_what_cannot_be_collected_is_refused(model: nn.Module, init: str, data: Any, message: str) -> None:
    targets: Any = "0" if isinstance(model, nn.Sequential) else "all-linear"
    inject(model, LoRAConfig(r=2, init=init, target_modules=targets))
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, data)


def test_too_few_tokens_are_mentioned() -> None:
    with pytest.warns(UserWarning, match="of 8 tokens leave some of the 10 directions of the inputs of layer 'down'"):
        collect_statistics(adapted(), batches(1))


def test_sums_wait_for_no_device_and_keep_float32_under_autocast() -> None:
    x, mask = torch.randn(64, 8), torch.rand(64) > 0.5
    with FakeTensorMode():  # of such tensors the host can have no number
        Moments(8, torch.device("cpu")).add(torch.empty(64, 8), torch.empty(64, dtype=torch.bool))
    exact, cast = Moments(8, torch.device("cpu")), Moments(8, torch.device("cpu"))
    exact.add(x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(x, mask)
    assert all(torch.equal(one, other) for one, other in zip(exact.parts, cast.parts, strict=True))
    assert counted_rows({"attention_mask": None}) is None
    assert counted_rows(x) is None


class Rewritten(nn.Module):
    """A tensor that is written to between the two layers that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.one(x)
        x.mul_(3)
        return self.other(x).sum() + y.sum()


def test_a_tensor_that_was_written_to_is_another_input() -> None:
    model, x = Rewritten(), torch.randn(9, 6)
    inject(model, LoRAConfig(r=2, init="eva"))
    found = collect_statistics(model, [x])
    torch.testing.assert_close(found["other"].inputs, 9 * found["one"].inputs)
    torch.testing.assert_close(found["one"].inputs, x.T @ x / 9)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_failure_leaves_nothing_switched_off(init: str) -> None:
    """Not even while somebody holds the error, as a notebook does."""
    model = adapted(init).train()
    calls: list[int] = []

    def failing(batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("a file of the user's")
        return model(**batch)

    with pytest.raises(OSError, match="of the user's") as held:
        collect_statistics(model, batches(), failing)
    assert held.tb is not None
    assert torch.is_grad_enabled()
    assert all(child.training for child in model.modules())
    assert all(layer.enabled and not layer._forward_hooks for layer in lora_layers(model).values())


def test_layers_that_recompute_in_training_do_so_for_gradients_of_a_start() -> None:
    """Else a model that fits with checkpointing alone would not fit when its start is computed."""
    found: list[dict[str, Statistics]] = []
    calls: list[list[Any]] = [[], []]
    for recomputes in (False, True):
        model = tiny_model("llama")
        inject(model, LoRAConfig(r=2, init="lora_ga"))
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, own=calls[recomputes]: own.append(1))
        found.append(collect_statistics(model, token_batches(2)))
        assert "forward" not in vars(model.model.layers[1])
    assert [len(own) for own in calls] == [3, 5]  # one forward pass tells which layers are called
    for name, each in found[0].items():
        torch.testing.assert_close(found[1][name].gradient, each.gradient)
