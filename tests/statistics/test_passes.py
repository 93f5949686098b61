"""What a pass over data leaves behind, how modules are called in it, and what its results are kept under."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from milora_lightning import LoRAConfig, collect_statistics, initialize, inject, lora_layers
from milora_lightning.starts import Statistics
from milora_lightning.statistics import kept, ranks_by_variance
from milora_lightning.statistics.collecting import grouped, size_of
from milora_lightning.statistics.passes import Pass, _recomputed


class Net(nn.Module):
    """Drops entries in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.drop, self.down = nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 4)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.down(self.drop(self.up(x * factor)).relu())


class ByKeyword(Net):
    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.down(input=self.drop(self.up(input=x * factor)).relu())


class WithLoss(Net):
    def start_loss(self, batch: Tensor) -> Tensor:
        return self(batch).square().mean()


def adapted(init: str = "eva", kind: type[Net] = Net) -> Net:
    inject(model := kind(), LoRAConfig(r=2, init=init))
    return model


def data(seed: int = 1, number: int = 3) -> list[Tensor]:
    return list(torch.randn(number, 20, 6, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("init", ["eva", "lora_one"])
def test_modes_and_hooks_are_as_before_and_nothing_is_dropped(init: str) -> None:
    model = adapted(init, WithLoss).train()
    model.up.eval()
    modes = [module.training for module in model.modules()]
    first, again = (collect_statistics(model, data())["down"] for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert [module.training for module in model.modules()] == modes
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert hooks == [h for m in adapted(init, WithLoss).modules() for h in m._forward_hooks.values()]


def test_a_pass_is_of_the_pretrained_module() -> None:
    model = adapted("milora")
    before = model.eval()(data()[0])
    initialize(model)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.add_(0.5)
    changed = model(data()[0])
    over = Pass(model, data(), model, lambda batch: batch, torch.device("cpu"))
    batch, counts = next(steps := over.run())
    torch.testing.assert_close(over.call_with(batch), before)
    assert counts
    steps.close()
    assert torch.equal(model(data()[0]), changed)
    assert (changed - before).abs().max() > 0.1


def test_batches_are_passed_as_what_they_are() -> None:
    plain = collect_statistics(adapted(), data())
    doubled = collect_statistics(adapted(), [(x, 2.0) for x in data()])
    named = collect_statistics(adapted(), [{"x": x, "factor": 2.0} for x in data()])
    called = collect_statistics(model := adapted(), data(), lambda x: model(x, 2.0))
    config = LoRAConfig(r=2, init="eva")
    keyword = collect_statistics(ByKeyword(), [(x, 2.0) for x in data()], config=config)
    for found in (doubled, named, called, keyword):
        torch.testing.assert_close(found["up"].inputs, 4 * plain["up"].inputs)
        assert torch.equal(found["down"].inputs, doubled["down"].inputs)


def test_what_is_learned_and_what_is_preserved_are_told_apart() -> None:
    found = collect_statistics(adapted("sc_lora"), data(1), preserve=data(2, 5))
    for seed, number, name in ((1, 3, "inputs"), (2, 5, "preserved")):
        expected = collect_statistics(adapted(), data(seed, number))
        for layer in ("up", "down"):
            assert torch.equal(getattr(found[layer], name), expected[layer].inputs)
    with pytest.raises(ValueError, match="no batch"):
        collect_statistics(adapted("sc_lora"), data(), preserve=[])


def test_layers_that_have_started_take_nothing_more() -> None:
    model = adapted()
    initialize(model, statistics=collect_statistics(model, data()))
    with pytest.raises(ValueError, match="takes nothing from data"):
        collect_statistics(model, data())


@pytest.mark.parametrize("needs", [("inputs",), ("inputs", "preserved"), ("gradient",), ("inputs", "gradient")])
def test_the_size_of_sums_is_that_of_their_numbers(needs: Any) -> None:
    layers = {"up": nn.Linear(6, 9), "down": nn.Linear(9, 4)}
    shapes = {"inputs": ((6, 6), (9, 9)), "preserved": ((6, 6), (9, 9)), "gradient": ((9, 6), (4, 9))}
    assert size_of(layers, needs) == sum(4 * m * n for need in needs for m, n in shapes[need])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("room", [1, 7, 12, 10**6])
def test_groups_fit_and_hold_each_layer_once(room: int, together: bool) -> None:
    owners = {"q": "q", "k": "q", "v": "q", "o": "o", "up": "up", "gate": "up", "down": "down"}
    sizes = {"q": 4, "k": 4, "v": 4, "o": 5, "up": 6, "gate": 6, "down": 9}
    groups = grouped(sizes, owners, room, together)
    assert sorted(name for group in groups for name in group) == sorted(sizes)
    for group in groups:
        of = {owners[name] for name in group}
        assert all((owner in of) == (name in group) for name, owner in owners.items())
        size = sum(sizes[name] for name in (of if together else group))
        assert size <= room or len(of) == 1
    assert len(groups) == {1: 4, 7: 4, 10**6: 1}.get(room, len(groups))


def test_batches_that_differ_in_anything_have_keys_that_differ() -> None:
    x = torch.arange(6.0)
    batches: list[Any] = [
        [{"x": x}], [{"y": x}], [{"x": x.view(2, 3)}], [{"x": x.int()}], [{"x": x.view(torch.int32)}], [{"x": x + 1}],
        [x, x], [[x, x]], [[x], [x]], [[[x], x]], [], [[]], [None], ["None"], [1], [True], [1.0], ["1"],
        [{"x": x.numpy(), "y": None}],
    ]  # fmt: skip
    keys = [kept.key_of(each) for each in batches] + [kept.key_of([], other) for other in ("a", "b", ("a", "b"), 1)]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert kept.key_of([{"x": x.clone()}], "a") == kept.key_of([{"x": x}], "a")


def test_what_modules_compute_with_is_described_and_their_mode_is_not() -> None:
    model, other = nn.Sequential(nn.LeakyReLU(0.1)), nn.Sequential(nn.LeakyReLU(0.2))
    assert kept.computes_with(model) != kept.computes_with(other)
    assert kept.computes_with(model) == kept.computes_with(nn.Sequential(nn.LeakyReLU(0.1)).eval())
    model[0].beta = 3.0
    assert kept.computes_with(model) != kept.computes_with(nn.Sequential(nn.LeakyReLU(0.1)))


def test_a_models_configuration_is_part_of_what_it_computes_with() -> None:
    """Attention reads its scale, say, from there alone, and has no attribute of its own for it."""
    models = [nn.Sequential(nn.Identity()) for _ in range(3)]
    for model, scale in zip(models, (1.0, 1.0, 2.0), strict=True):
        model.config = LlamaConfig(attention_multiplier=scale)
    first, same, other = map(kept.computes_with, models)
    assert first == same != other


def statistics(number: int) -> list[dict[str, Statistics]]:
    """Two groups of layers, the first with twice as many tensors as layers."""
    draw = torch.randn(number + 1, 3, 3, generator=torch.Generator().manual_seed(0))
    many = {f"layer{i}": Statistics(draw[i].clone(), mean=draw[0, 0].clone() if i else None) for i in range(number)}
    return [many, {"last": Statistics(gradient=draw[-1].clone())}]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    return tmp_path / "statistics"


def through_cache(groups: list[dict[str, Statistics]], ranks: int = 1) -> tuple[dict[str, Statistics], bool]:
    """What comes back, and whether it was collected."""
    collected = []

    def collect() -> Any:
        collected.append(True)
        yield from groups

    names = [name for group in groups for name in group]
    found = {name: each for group in kept.with_cache("key", names, collect, 100, ranks) for name, each in group.items()}
    return found, bool(collected)


@pytest.mark.parametrize("number", [1, 15])
def test_what_is_kept_comes_back_however_many_tensors_there_are(number: int, cache: Path) -> None:
    groups = statistics(number)
    first, again = through_cache(groups), through_cache(groups)
    assert (first[1], again[1]) == (True, False)
    assert list(again[0]) == [name for group in groups for name in group]
    for name, entry in first[0].items():
        for one, other in zip(entry, again[0][name], strict=True):
            assert one is other is None or torch.equal(one, other)


def test_what_one_rank_cannot_read_all_collect(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that read while another collected would leave it waiting."""
    through_cache(statistics(2))

    def gather(flags: list[bool], own: bool) -> None:
        flags[:] = own, False

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert through_cache(statistics(2), ranks=2)[1]


def test_one_process_of_a_machine_writes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    through_cache(statistics(2))
    assert not cache.exists()


def test_names_of_layers_are_no_patterns_in_ranks() -> None:
    flat, steep = torch.eye(4), torch.diag(torch.tensor([9.0, 1.0, 0.0, 0.0]))
    found = ranks_by_variance({"a.b": Statistics(steep), "a-b": Statistics(flat)}, r=2)
    config = LoRAConfig(r=2, rank_pattern=found)
    assert (config.rank("a.b"), config.rank("a-b"), config.rank("a+b")) == (1, 3, 2)


def test_what_is_damaged_is_collected_again_with_a_warning_and_stays(cache: Path) -> None:
    """Until the user deletes it, as the warning says."""
    groups = statistics(3)
    through_cache(groups)
    file = cache / "key" / "0.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"unusable, and collected anew \(.+\): delete this folder"):
            found, collected = through_cache(groups)
        assert collected
        assert found.keys() == {"layer0", "layer1", "layer2", "last"}
        assert file.read_bytes() == damaged
    file.unlink()  # by somebody who cleans up old files
    with pytest.warns(UserWarning, match="there are none of layer 'layer0'"):
        assert through_cache(groups)[1]


def test_what_is_too_large_is_not_kept_and_that_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kept, "LARGEST", 99)
    for _ in range(2):
        assert through_cache(statistics(1))[1]
    assert not cache.exists()
    assert "is too much to keep" in capsys.readouterr().err
    monkeypatch.setattr(kept, "LARGEST", 100)
    assert [through_cache(statistics(1))[1] for _ in range(2)] == [True, False]


@pytest.mark.parametrize("when", ["at the beginning", "later", "at the end"])
def test_a_run_goes_on_where_nothing_can_be_kept(when: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if when == "at the beginning":
        monkeypatch.setattr(kept, "new_cache_folder", full)
    elif when == "later":
        monkeypatch.setattr(kept, "save_file", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    with pytest.warns(
        UserWarning, match=r"cannot be kept in .*statistics' \(.*No space left.*Set MILORA_CACHE"
    ) as said:
        found, _ = through_cache(statistics(3))
    assert len(said) == 1
    assert found.keys() == {"layer0", "layer1", "layer2", "last"}
    monkeypatch.undo()
    assert not list(cache.glob("*"))


def test_an_error_of_the_data_is_not_taken_for_one_of_the_disk(cache: Path) -> None:
    def collect() -> Any:
        yield statistics(1)[0]
        raise FileNotFoundError("the data's file")

    with pytest.raises(FileNotFoundError, match="the data's file"):
        list(kept.with_cache("key", ["layer0"], collect, 100))
    assert not list(cache.iterdir())


def test_without_a_key_nothing_is_kept(cache: Path) -> None:
    def collect() -> Any:
        yield from statistics(1)

    assert len(list(kept.with_cache(None, ["layer0"], collect, 100))) == 2
    assert not cache.exists()


@pytest.mark.parametrize("keeps", [True, False])
def test_a_layer_that_is_recomputed_fills_no_cache_twice(keeps: bool) -> None:
    """Some of transformers' layers take care of that themselves."""
    given: list[dict[str, Any]] = []

    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        given.append(kwargs)
        return x.square()

    layer: Any = SimpleNamespace(_can_checkpoint_with_cache=keeps)
    x, cache = torch.ones(2, requires_grad=True), object()
    _recomputed(layer, forward, x, use_cache=True, past_key_values=cache, other=3).sum().backward()
    wanted = {"use_cache": False, "past_key_values": cache if keeps else None, "other": 3}
    assert given == [wanted, wanted]
    assert x.grad is not None
    assert _recomputed(layer, forward, x.detach()).sum() == 2
    assert given[-1] == {}


def test_layers_whose_inputs_no_rank_sees_whole_are_refused() -> None:
    model = adapted()
    model.down.part = object()
    with pytest.raises(
        ValueError, match=r"'down' is split by tensor parallelism, where no rank sees all of its inputs"
    ):
        collect_statistics(model, data())
