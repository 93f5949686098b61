"""Starts: what they compute, that the model is the pretrained one there, and that one's own can be registered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest
import torch
from helpers.exports import logits, tuned
from helpers.models import quiet_trainer, tiny_model
from helpers.starting import FROM_DATA, told
from lightning.pytorch import LightningModule
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from milora_lightning import (
    LoRAConfig,
    MiLoRAInit,
    export_peft,
    initialize,
    inject,
    load_adapter,
    lora_layers,
    register_start,
)
from milora_lightning.adapters.factor_cache import cached_factors
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.linalg import SingularSlice, singular_slice
from milora_lightning.starts import Statistics, find_start, registry

R = 4
STARTS = [
    "milora",
    "pissa",
    "middle",
    "random",
    "lora",
    "mica",
    "olora",
    "orthogonal",
    "slice 0.25",
    "minor x principal",
    "principal x minor",
    "random x unit",
    "gaussian x minor",
    "gaussian x unit x 0.5",
    *FROM_DATA,
]


@pytest.fixture
def own() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = dict(registry._REGISTERED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def product(init: str, W: Tensor, scaling: float = 1.5) -> Tensor:
    A, B = initial_factors(W, R, scaling, init, torch.Generator().manual_seed(1))
    return scaling * B.double() @ A.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", STARTS)
def test_the_model_starts_as_the_pretrained_one_bit_for_bit(init: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    before = logits(model)
    layers = inject(model, LoRAConfig(r=R, lora_alpha=6, init=init))
    initialize(model, statistics=told("llama", dtype, init))
    assert torch.equal(logits(model), before)
    assert any(layer.lora_A.any() or layer.lora_B.any() for layer in layers.values())


@pytest.mark.parametrize("init", STARTS[5:])
def test_peft_opens_the_export_with_equal_outputs(init: str, tmp_path: Path) -> None:
    model = tuned(tmp_path / "base", init=init)
    export_peft(model, tmp_path / "peft")
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-5)
    rank = R if init in ("lora", "mica", "eva") else 2 * R
    assert opened.peft_config["default"].r == rank


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_directions_times_values_against_a_full_decomposition(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)

    def part(start: int, values: Tensor) -> Tensor:
        return U[:, start : start + R] * values @ Vh[start : start + R]

    minor, principal, one = S[-R:], S[:R], torch.ones(R, dtype=S.dtype)
    for init, expected in {
        "slice 0.25": part(3, S[3:7]),
        "slice 0": part(0, principal),
        "slice 1": part(12, minor),
        "minor x principal": part(12, principal),
        "principal x minor": part(0, minor),
        "middle x unit": part(6, one),
        "minor x own x 0.5": part(12, minor / 2),
        "principal x unit x 3": part(0, 3 * one),
    }.items():
        torch.testing.assert_close(product(init, W), expected, rtol=0, atol=1e-5)
    assert (product("minor x principal", W) - part(12, minor)).norm() > 1


def test_gaussian_directions_have_the_values_asked_for() -> None:
    W = weight(24, 16)
    S = torch.linalg.svdvals(W.double())
    for values, expected in {"minor": S[-R:], "principal": S[:R], "unit": torch.ones(R, dtype=S.dtype)}.items():
        found = torch.linalg.svdvals(product(f"gaussian x {values}", W))[:R]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    draws = torch.stack([initial_factors(W, 1, 1.0, "gaussian x unit", torch.Generator().manual_seed(i))[0][0]
                         for i in range(300)])  # fmt: skip
    assert draws.mean(0).abs().max() < 0.25 / 16**0.5 * 4  # no direction is preferred, not even by its sign


@pytest.mark.parametrize(
    ("init", "name"),
    [
        ("minor", "milora"),
        ("principal x principal", "pissa"),
        ("slice 0.5", "middle"),
        ("milora x 1", "milora"),
        ("gaussian × minor x 1.0", "gaussian x minor"),
        ("slice .250", "slice 0.25"),
    ],
)
def test_what_computes_the_same_has_one_name(init: str, name: str) -> None:
    assert LoRAConfig(init=init).init == name


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("milra", r"init='milra' is no start: take one of milora, .*mica"),
        ("gaussian", "leaves open which singular values"),
        ("slice 1.5", "position in the spectrum"),
        ("slice", "position in the spectrum"),
        ("minor x mine", "cannot be read"),
        ("minor x principal x -1", "cannot be read"),
        ("minor x principal x 1 x 2", "cannot be read"),
    ],
)
def test_mistakes_are_named(init: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(init=init)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_olora_is_pefts(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    Q, full = torch.linalg.qr(W.double())
    A, B = initial_factors(W, R, 1.5, "olora")
    torch.testing.assert_close(B.double(), Q[:, :R], rtol=0, atol=1e-6)
    torch.testing.assert_close(A.double(), full[:R], rtol=0, atol=1e-5)
    theirs = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    theirs[0].weight.data = W.clone()
    opened = get_peft_model(theirs, LoraConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights="olora"))
    layer = opened.base_model.model[0]
    torch.testing.assert_close(layer.lora_A["default"].weight, A, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.lora_B["default"].weight, B, rtol=0, atol=1e-5)


def test_orthogonal_factors_have_no_product_and_half_the_rank_each() -> None:
    A, B = initial_factors(weight(40, 32), R, 1.0, "orthogonal", torch.Generator().manual_seed(0))
    assert (B @ A).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == R // 2
    assert 0.05 < A.std() < 0.15
    with pytest.raises(ValueError, match="take an even r"):
        initial_factors(weight(40, 32), 3, 1.0, "orthogonal")


def test_a_step_of_mica_is_pefts() -> None:
    x = weight(10, 16)
    W = weight(24, 16)

    def stepped(model: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
        model(x).square().mean().backward()
        optimizer.step()
        return model(x)

    models = [nn.Sequential(nn.Linear(16, 24, bias=False)) for _ in range(2)]
    for model in models:
        model[0].weight.data = W.clone()
    (layer,) = inject(models[0], LoRAConfig(r=R, lora_alpha=6, init="mica")).values()
    initialize(models[0])
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A"]
    options = {"r": R, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": "mica"}
    theirs = get_peft_model(models[1], LoraConfig(**options))
    before = x @ W.T
    ours = stepped(models[0])
    assert (ours - before).norm() > 0.01 * before.norm()
    torch.testing.assert_close(ours, stepped(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["lora", "random", "orthogonal", "gaussian x minor"])
def test_equal_layers_start_differently_and_the_same_in_every_run(init: str) -> None:
    def starts() -> list[Tensor]:
        model = nn.Sequential(nn.Linear(16, 24), nn.Linear(16, 24))
        for layer in model:
            layer.weight.data = weight(24, 16)
        inject(model, LoRAConfig(r=R, init=init))
        initialize(model, seed=3)
        torch.randn(5)  # draws of others do not matter
        return [layer.lora_A.detach() for layer in lora_layers(model).values()]

    first, again = starts(), starts()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (first[0].T @ first[0] - first[1].T @ first[1]).norm() > 0.1 * first[0].norm() ** 2


def test_one_of_ones_own(own: None) -> None:
    seen = []

    @register_start("columns", frozen="lora_A")
    def columns(W: Tensor, r: int, statistics: Statistics | None, generator: torch.Generator | None) -> SingularSlice:
        seen.append(statistics)
        W.zero_()  # what it is given is a copy
        return SingularSlice(torch.eye(len(W))[:, :r], torch.full((r,), 2.0), torch.eye(W.shape[1])[:r])

    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    before = model(x := weight(3, 16))
    layers = inject(model, LoRAConfig(r=R, lora_alpha=6, init="columns"))
    moments = Statistics(inputs=torch.eye(16))
    initialize(model, statistics={"0": moments})
    assert torch.equal(model(x), before)
    assert len(seen) == 2
    assert seen[0] is moments or seen[1] is moments
    for layer in layers.values():
        expected = torch.zeros(layer.out_features, layer.in_features)
        expected[:R, :R] = 2 * torch.eye(R)
        torch.testing.assert_close(layer.scaling * layer.initial_B @ layer.initial_A, expected)
        assert (layer.lora_A.requires_grad, layer.lora_B.requires_grad) == (False, True)
    model(x).sum().backward()
    assert layers["0"].lora_A.grad is None
    assert layers["0"].lora_B.grad is not None
    inject(model, LoRAConfig(r=R, lora_alpha=6, init="columns"))  # twice is once
    assert not layers["0"].lora_A.requires_grad


def bad(what: str, W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    A, B = torch.ones(r, W.shape[1]), torch.ones(W.shape[0], r)
    results = {"shape": (A.T, B), "nan": (A * torch.nan, B), "product": (A, B), "nothing": None, "one": A}
    return results[what]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r"layer '0' .*A₀ has to be \(4, 16\)"),
        ("nan", "NaN or infinite"),
        ("product", "zero_product"),
        ("nothing", "gives NoneType"),
        ("one", "gives Tensor"),
    ],
)
def test_what_no_adapter_can_start_from_is_refused(own: None, what: str, message: str) -> None:
    register_start("bad", zero_product=True)(lambda W, r, statistics, generator: bad(what, W, r))
    model = nn.Sequential(nn.Linear(16, 24))
    inject(model, LoRAConfig(r=R, init="bad"))
    with pytest.raises(ValueError, match=message):
        initialize(model)


def test_names_are_taken_once(own: None) -> None:
    def other(W: Tensor, r: int, *_: object) -> SingularSlice:
        return singular_slice(W, r)

    for name in ("milora", "lora", "minor", "slice 0.2", "two words", "full", "minor x unit"):
        with pytest.raises(ValueError, match=r"give yours another name|cannot be named"):
            register_start(name)(other)
    register_start("other")(other)
    register_start("other")(other)  # as when a notebook's cell runs again
    with pytest.raises(ValueError, match="registered as 'other' already"):
        register_start("other")(bad)  # type: ignore[arg-type]
    elsewhere = FunctionType(other.__code__, globals())  # the same name in another module
    elsewhere.__qualname__, elsewhere.__module__ = other.__qualname__, "elsewhere"
    with pytest.raises(ValueError, match="registered as 'other' already"):
        register_start("other")(elsewhere)
    with pytest.raises(ValueError, match="as in @register_start"):
        register_start(other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init=None is no start"):
        LoRAConfig(init=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frozen must be"):
        register_start("another", frozen="B")  # type: ignore[arg-type]


@pytest.mark.parametrize("init", ["mica", "gaussian x minor", "random x principal", "slice 0.25"])
def test_the_cache_gives_what_was_computed(init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    W = weight(160, 128)
    drawn = [torch.Generator().manual_seed(seed) for seed in (1, 1, 1, 2)]
    plain = initial_factors(W, R, 1.5, init, drawn[0])
    for generator in drawn[1:3]:
        read = cached_factors(W, R, 1.5, init, generator)
        assert all(torch.equal(x, y) for x, y in zip(plain, read, strict=True))
    assert len(list((tmp_path / "factors").iterdir())) == 1
    other = cached_factors(W, R, 1.5, init, drawn[3])
    assert torch.equal(other[1], plain[1]) != find_start(init).random


def test_registered_starts_are_kept_by_version_weight_and_statistics(
    own: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    computed = []

    def mine(W: Tensor, r: int, statistics: Statistics | None, generator: object) -> SingularSlice:
        computed.append(statistics)
        return singular_slice(W, r)

    W, moments = weight(160, 128), Statistics(inputs=torch.eye(128))
    for version, times in ((None, 2), (1, 1), (2, 1)):
        register_start("mine", version=version)(mine)
        computed.clear()
        for _ in range(2):
            cached_factors(W, R, 1.0, "mine", torch.Generator().manual_seed(0))
        assert len(computed) == times
    cached_factors(W, R, 1.0, "mine", torch.Generator().manual_seed(0), moments)
    cached_factors(W, R, 1.0, "mine", torch.Generator().manual_seed(0), Statistics(inputs=2 * torch.eye(128)))
    assert len(computed) == 3


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 24)

    def training_step(self, x: Tensor) -> Tensor:
        return (self.layer(x) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(weight(8, 16), batch_size=2)  # type: ignore[arg-type]


def fitted(folder: Path, init: str, epochs: int, resumed: Path | None = None) -> Small:
    lm = Small()
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=[MiLoRAInit(r=R, lora_alpha=6, init=init, seed=0)])
    trainer.fit(lm, ckpt_path=resumed)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return lm


@pytest.mark.parametrize("init", ["mica", "gaussian x minor", "columns"])
def test_a_resumed_run_goes_on_and_what_is_frozen_travels_along(init: str, own: None, tmp_path: Path) -> None:
    @register_start("columns", frozen="lora_B")
    def columns(W: Tensor, r: int, statistics: object, generator: object) -> tuple[Tensor, Tensor]:
        return torch.eye(W.shape[1])[:r], W[:, :r]

    whole = fitted(tmp_path, init, 4)
    half = fitted(tmp_path, init, 2)
    start = initial_factors(whole.layer.base_layer.weight, R, 1.5, init, torch.Generator().manual_seed(0))
    registry._REGISTERED["columns"] = find_start("columns").__class__(  # a second SVD, or call, would show
        "columns", lambda *_: (torch.zeros(R, 16), torch.zeros(24, R)), frozen="lora_B", registered=True
    )
    resumed = fitted(tmp_path, init, 4, tmp_path / "2.ckpt")
    state = whole.layer.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in resumed.layer.state_dict().items())
    assert (state["lora_A"] - half.layer.state_dict()["lora_A"]).abs().max() > 1e-3
    if init != "gaussian x minor":
        assert torch.equal(whole.layer.lora_B, start[1])
    del registry._REGISTERED["columns"]
    if init == "columns":
        with pytest.raises(ValueError, match=r"init='columns' is no start.*import the module that calls"):
            load_adapter(Small(), tmp_path / "4.ckpt")
    else:
        load_adapter(again := Small(), tmp_path / "4.ckpt")
        assert torch.equal(again.layer.delta_weight(), whole.layer.delta_weight())
