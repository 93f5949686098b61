"""Starts from data: each against its paper's formula in float64, and against PEFT's where that has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.starting import FROM_DATA
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

from milora_lightning import LoRAConfig, initialize, inject, lora_layers, register_start
from milora_lightning.adapters.factor_cache import cached_factors
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.starts import Statistics, find_start

R, SCALE = 4, 1.5
SHAPES = [(24, 16), (16, 24)]


def told(shape: tuple[int, int], tokens: int = 200) -> tuple[Tensor, Tensor, Statistics]:
    """A weight, inputs whose features have different sizes and a mean, and all statistics."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    W, X, other = draw(*shape), draw(tokens, shape[1]) + 0.5, draw(tokens, shape[1])
    X, other = X * torch.linspace(0.2, 3, shape[1]), other * torch.linspace(3, 0.2, shape[1])
    statistics = Statistics(X.T @ X / tokens, draw(*shape), X.mean(0), other.T @ other / tokens)
    return W, X, Statistics(*(x.float() for x in statistics))


def product(init: str, W: Tensor, statistics: Statistics) -> Tensor:
    A, B = initial_factors(W.float(), R, SCALE, init, None, statistics)
    return SCALE * B.double() @ A.double()


def projector(columns: Tensor) -> Tensor:
    Q, _ = torch.linalg.qr(columns.double())
    return Q @ Q.T


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=2e-5 * float(other.norm()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("init", ["corda", "corda_ipm"])
def test_corda(init: str, shape: tuple[int, int]) -> None:
    W, _, told_ = told(shape)
    C = told_.inputs.double()
    C = C + 0.01 * C.diagonal().mean() * torch.eye(shape[1])
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    which = slice(-R, None) if init == "corda" else slice(R)
    close(product(init, W, told_), U[:, which] * S[which] @ Vh[which] @ torch.linalg.inv(C))
    one, other = (
        initial_factors(W.float(), R, SCALE, init, None, told_._replace(inputs=scale * told_.inputs))
        for scale in (1, 70)
    )
    close(one[0] @ one[0].T, other[0] @ other[0].T)  # no scale of C matters, neither to the product nor to its parts
    close(one[1].T @ one[1], other[1].T @ other[1])
    with pytest.raises(ValueError, match="nothing but zeros"):
        initial_factors(W.float(), R, SCALE, init, None, told_._replace(inputs=torch.zeros_like(told_.inputs)))


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_corda_is_pefts(method: str, tmp_path: Path) -> None:
    W, _, told_ = told((24, 16))
    theirs = nn.Sequential(nn.Linear(16, 24, bias=False))
    theirs[0].weight.data = W.float()
    torch.save({"0": told_.inputs / told_.inputs.diagonal().mean()}, tmp_path / "C.pt")
    config = LoraConfig(
        r=R,
        lora_alpha=SCALE * R,
        target_modules=["0"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method, covariance_file=str(tmp_path / "C.pt")),
    )
    preprocess_corda(theirs, config)
    layer = get_peft_model(theirs, config).base_model.model[0]
    A, B = initial_factors(W.float(), R, SCALE, "corda" if method == "kpm" else "corda_ipm", None, told_)
    signs = (A * layer.lora_A["default"].weight).sum(1).sign()
    torch.testing.assert_close(A * signs[:, None], layer.lora_A["default"].weight.data, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(B * signs, layer.lora_B["default"].weight.data, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_null(shape: tuple[int, int]) -> None:
    W, X, told_ = told(shape)
    N = torch.linalg.svd(X, full_matrices=False).Vh[-R:].T
    close(product("lora_null", W, told_), W @ N @ N.T)
    A, B = initial_factors(W.float(), R, SCALE, "lora_null", None, told_)
    close((A @ A.T).diagonal(), (B.T @ B).diagonal())  # the singular values are shared out equally
    used = (X @ A.double().T).norm() / (X.norm() * A.norm())
    assert used < 0.3 * shape[1] ** -0.5  # of what random directions use, in the mean of squares


@pytest.mark.parametrize("shape", SHAPES)
def test_eva(shape: tuple[int, int]) -> None:
    W, X, told_ = told(shape)
    A, B = initial_factors(W.float(), R, SCALE, "eva", None, told_)
    Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False).Vh
    close(A.double() @ A.double().T, torch.eye(R))
    close(projector(A.T), projector(Vh[:R].T))
    assert not B.any()
    uncentred, _ = initial_factors(W.float(), R, SCALE, "eva", None, told_._replace(mean=None))
    close(projector(uncentred.T), projector(torch.linalg.svd(X, full_matrices=False).Vh[:R].T))


def test_eva_is_pefts() -> None:
    W, X, told_ = told((24, 16))
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    config = LoraConfig(
        r=R, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, use_label_mask=False)
    )
    batches = [X.float()] * 4  # of different ones PEFT's incremental components are approximate
    options = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    found = get_eva_state_dict(model, batches, config, forward_fn=lambda model, x: model(x), **options)
    A, _ = initial_factors(W.float(), R, 1.0, "eva", None, told_)
    uncentred, _ = initial_factors(W.float(), R, 1.0, "eva", None, told_._replace(mean=None))
    ours, not_ours = ((projector(x.T) - projector(found["0"].T)).norm() for x in (A, uncentred))
    assert ours < 0.05 < 0.5 < not_ours  # PEFT's decomposition is a randomized one


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("init", ["astra", "astra_ipm", "sc_lora", "sc_lora 0.8"])
def test_projections_on_eigenvectors_of_outputs(init: str, shape: tuple[int, int]) -> None:
    W, _, told_ = told(shape)
    beta = {"sc_lora": 0.5, "sc_lora 0.8": 0.8}.get(init, 0.0)
    moments = (1 - beta) * told_.inputs.double() - beta * told_.preserved.double()
    _, vectors = torch.linalg.eigh(W @ moments @ W.T)
    Q = vectors[:, :R] if init == "astra" else vectors[:, -R:]
    A, B = initial_factors(W.float(), R, SCALE, init, None, told_)
    close(B.T @ B, torch.eye(R))
    torch.testing.assert_close(A.double(), B.double().T @ W, rtol=0, atol=1e-5)
    if init == "astra" and shape[0] > shape[1]:  # outputs fill a part of their space only
        assert (B.double().T @ W).norm() < 1e-5
    else:
        close(projector(B), Q @ Q.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga(shape: tuple[int, int]) -> None:
    W, _, told_ = told(shape)
    U, _, Vh = torch.linalg.svd(told_.gradient.double(), full_matrices=False)
    A, B = initial_factors(W.float(), R, SCALE, "lora_ga", None, told_)
    scale = shape[0] ** 0.25 / 4
    close(A.double().T @ A.double(), scale**2 * Vh[:R].T @ Vh[:R])
    close(B.double() @ B.double().T, scale**2 * U[:, R : 2 * R] @ U[:, R : 2 * R].T)
    with pytest.raises(ValueError, match="set r to 8 at most"):
        initial_factors(W.float(), 9, SCALE, "lora_ga", None, told_)


def test_directions_of_lora_ga_are_pefts() -> None:
    W, _, told_ = told((24, 16))
    theirs = nn.Sequential(nn.Linear(16, 24, bias=False))
    theirs[0].weight.data = W.float()
    theirs[0]._peft_loraga_grad = told_.gradient
    config = LoraConfig(r=R, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    layer = get_peft_model(theirs, config).base_model.model[0]
    A, B = initial_factors(W.float(), R, 1.0, "lora_ga", None, told_)
    close(projector(A.T), projector(layer.lora_A["default"].weight.data.T))
    close(projector(B), projector(layer.lora_B["default"].weight.data))


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_one(shape: tuple[int, int]) -> None:
    W, _, told_ = told(shape)
    U, S, Vh = torch.linalg.svd(-told_.gradient.double(), full_matrices=False)
    close(product("lora_one", W, told_), SCALE * U[:, :R] * S[:R] / S[0] / 128 @ Vh[:R])
    A, B = initial_factors(W.float(), R, SCALE, "lora_one", None, told_)
    close((A @ A.T).diagonal(), (B.T @ B).diagonal())


@pytest.mark.parametrize("init", FROM_DATA)
def test_statistics_that_are_missing_or_wrong_are_named(init: str) -> None:
    *_, told_ = told((24, 16))
    model = nn.Sequential(nn.Linear(16, 24))
    inject(model, LoRAConfig(r=R, init=init))
    with pytest.raises(ValueError, match=r"layer '0'.*takes the statistics '\w+' of data.*collect_statistics"):
        initialize(model)
    need = find_start(init).needs[-1]
    for bad, message in ((torch.eye(3), r"shape \(3, 3\)"), (getattr(told_, need) * torch.nan, "NaN or infinite")):
        with pytest.raises(ValueError, match=message):
            initialize(model, statistics={"0": told_._replace(**{need: bad})})
    assert initialize(model, statistics={"0": told_}) == 1


def test_mistakes_in_names_and_gradients_are_named() -> None:
    for wrong in ("sc_lora x", "sc_lora 2"):
        with pytest.raises(ValueError, match=r"from 0 \(none\) to 1: 'sc_lora 0\.8'"):
            find_start(wrong)
    assert find_start("sc_lora 0.5").name == "sc_lora"
    W, _, told_ = told((24, 16))
    for init in ("lora_ga", "lora_one"):
        with pytest.raises(ValueError, match="gradient of its weight is zero"):
            initial_factors(W.float(), R, 1.0, init, None, told_._replace(gradient=torch.zeros(24, 16)))
    with pytest.raises(ValueError, match="needs must be a list"):
        register_start("mine", needs="inputs")


@pytest.mark.parametrize("init", ["corda", "eva", "sc_lora", "lora_ga"])
def test_cached_factors_are_those_of_weight_and_statistics(
    init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    W, _, told_ = told((160, 128))
    need = find_start(init).needs[-1]
    others = told_, told_, told_._replace(**{need: getattr(told_, need) + 0.1 * torch.randn(())})
    first, again, other = (cached_factors(W.float(), R, 1.0, init, None, each) for each in others)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert len(list((tmp_path / "factors").iterdir())) == 2
    plain = initial_factors(W.float(), R, 1.0, init, None, others[2])
    assert all(torch.equal(x, y) for x, y in zip(other, plain, strict=True))
    cached_factors(2 * W.float(), R, 1.0, init, None, told_)
    assert len(list((tmp_path / "factors").iterdir())) == 3


def test_a_start_of_ones_own_takes_what_it_needs() -> None:
    @register_start("strongest", needs=["inputs"])
    def strongest(W: Tensor, r: int, statistics: Statistics, generator: object) -> tuple[Tensor, Tensor]:
        best = statistics.inputs.diagonal().topk(r).indices
        return torch.eye(W.shape[1])[best], W[:, best]

    *_, told_ = told((24, 16))
    model = nn.Sequential(nn.Linear(16, 24))
    inject(model, LoRAConfig(r=R, init="strongest"))
    initialize(model, statistics={"0": told_})
    (layer,) = lora_layers(model).values()
    assert sorted(layer.initial_A.argmax(1).tolist()) == [12, 13, 14, 15]
