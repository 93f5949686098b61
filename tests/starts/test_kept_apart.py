"""Starts in one cache, random choices, and what a registered start may give, part by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from milora_lightning import LoRAConfig, initialize, inject, register_start
from milora_lightning.adapters.factor_cache import cached_factors
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.linalg import SingularSlice
from milora_lightning.starts import Statistics, find_start

R, OUT, IN = 2, 136, 128
KEPT = ["milora", "pissa", "middle", "random", "mica", "slice 0.25", "slice 0.3", "gaussian x minor", "gaussian x unit"]
KEPT += ["gaussian x minor x 2", "minor x principal", "minor x unit", "minor x unit x 0.5", "corda", "corda_ipm"]
KEPT += ["lora_null", "eva", "astra", "astra_ipm", "sc_lora", "sc_lora 0.8", "lora_ga", "lora_one"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def told() -> Statistics:
    draw = torch.randn(4, 200, IN, generator=seeded(1))
    inputs, preserved = (x.T @ x / len(x) for x in draw[:2])
    return Statistics(inputs, torch.randn(OUT, IN, generator=seeded(2)), draw[0].mean(0), preserved)


def test_starts_of_one_weight_share_a_folder_and_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    assert len({find_start(init).key for init in KEPT}) == len(KEPT)
    W, statistics = torch.randn(OUT, IN, generator=seeded(0)), told()
    for _ in range(2):  # what is computed, and what is read
        for init in ("astra", "astra_ipm", "sc_lora", "sc_lora 0.8", "gaussian x unit", "gaussian x unit x 3"):
            found = cached_factors(W, R, 1.0, init, seeded(3), statistics)
            alone = initial_factors(W, R, 1.0, init, seeded(3), statistics)
            assert all(torch.equal(x, y) for x, y in zip(found, alone, strict=True))
    assert len(list((tmp_path / "factors").iterdir())) == 6


def test_version_zero_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))

    @register_start("mine", version=0)
    def mine(W: Tensor, r: int, *_: object) -> tuple[Tensor, Tensor]:
        return torch.eye(W.shape[1])[:r], W[:, :r]

    cached_factors(torch.randn(OUT, IN), R, 1.0, "mine")
    assert len(list((tmp_path / "factors").iterdir())) == 1


@pytest.mark.parametrize("init", ["lora", "random", "orthogonal", "gaussian x unit"])
def test_random_starts_draw_on_their_generator_alone(init: str) -> None:
    W = torch.randn(24, 16, generator=seeded(0))
    before = torch.get_rng_state()
    first, again, other = (initial_factors(W, R, 1.0, init, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_loras_a_is_kaiming_uniform() -> None:
    A, B = initial_factors(torch.zeros(8, 64), 64, 1.0, "lora", seeded(0))
    assert A.abs().max() <= 1 / 8
    assert A.mean().abs() < 0.01 / 8
    assert A.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)
    assert not B.any()


def test_starts_at_the_ends_of_their_ranges_are_taken() -> None:
    assert [find_start(init).name for init in ("slice 0", "slice 1", "sc_lora 0", "sc_lora 1")] == [
        *("pissa", "milora", "sc_lora 0", "sc_lora 1")
    ]
    for init in ("minor x unit x 0", "minor x unit x inf", "minor x unit x nan"):
        with pytest.raises(ValueError, match="positive factor"):
            find_start(init)


def given(what: str, r: int, shape: torch.Size) -> Any:
    A, B = torch.ones(r, shape[1]), torch.ones(shape[0], r)
    U, Vh = torch.eye(shape[0])[:, :r], torch.eye(shape[1])[:r]
    return {
        "nan in B": (A, B * torch.nan),
        "nan in S": SingularSlice(U, torch.full((r,), torch.nan), Vh),
        "negative": SingularSlice(U, torch.tensor([1.0, -1.0]), Vh),
        "zeros": (0 * A, 0 * B),
    }[what]


@pytest.mark.parametrize(
    ("what", "message"), [("nan in B", "NaN"), ("nan in S", "NaN"), ("negative", "negative singular values")]
)
def test_every_part_of_what_a_start_gives_is_looked_at(what: str, message: str) -> None:
    register_start("given")(lambda W, r, *_: given(what, r, W.shape))
    model = nn.Sequential(nn.Linear(16, 24))
    inject(model, LoRAConfig(r=R, init="given"))
    with pytest.raises(ValueError, match=message):
        initialize(model)


def test_both_factors_may_be_zero_where_their_product_is() -> None:
    register_start("given", zero_product=True)(lambda W, r, *_: given("zeros", r, W.shape))
    model = nn.Sequential(nn.Linear(16, 24))
    inject(model, LoRAConfig(r=R, init="given"))
    assert initialize(model) == 1


@pytest.mark.parametrize("init", ["milora", "gaussian x minor", "principal x minor", "gaussian x minor x 2"])
def test_singular_values_that_are_zero_up_to_rounding_let_the_factors_train_as_in_lora(init: str) -> None:
    """Wherever the directions come from: A has norm, B is zero."""
    left, right = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, B = initial_factors(left @ right.T, 4, 2.0, init, torch.Generator().manual_seed(1))
    assert not B.any()
    torch.testing.assert_close(A.norm(dim=1), torch.ones(4))
