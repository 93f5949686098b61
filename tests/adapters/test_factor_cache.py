from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.adapters import factor_cache
from milora_lightning.adapters.factor_cache import cached_factors
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.starts import algebra

SHAPE = (160, 192)
R = 4


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    return tmp_path / "factors"


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that are decomposed."""
    shapes = []
    original = algebra.singular_slice

    def record(weight: Tensor, *args: object) -> object:
        shapes.append(tuple(weight.shape))
        return original(weight, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(algebra, "singular_slice", record)
    return shapes


def make_weight(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("init", ["milora", "pissa", "middle", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_equals_computed(folder: Path, decomposed: list[object], init: str, dtype: torch.dtype) -> None:
    weight = make_weight().to(dtype)

    def compute(function: object) -> tuple[Tensor, Tensor]:
        return function(weight, R, 2.0, init, torch.Generator().manual_seed(1))  # type: ignore[operator, no-any-return]

    plain, first = compute(initial_factors), compute(cached_factors)
    assert len(decomposed) == 2
    again = compute(cached_factors)
    assert len(decomposed) == 2
    for A, B, C in zip(plain, first, again, strict=True):
        assert torch.equal(A, B)
        assert torch.equal(B, C)


def test_the_scale_needs_no_second_entry(folder: Path, decomposed: list[object]) -> None:
    weight = make_weight()
    for scaling in (1.0, 0.5, 4.0):
        A, B = cached_factors(weight, R, scaling)
        C, D = initial_factors(weight, R, scaling)
        assert torch.equal(A, C)
        assert torch.equal(B, D)
    assert len(decomposed) == 1 + 3
    assert len(list(folder.iterdir())) == 1


def test_vanishing_components_survive(folder: Path) -> None:
    weight = make_weight()
    weight[:10] = 0
    for _ in range(2):
        A, B = cached_factors(weight, R, 4.0)
        torch.testing.assert_close(A @ A.mT, torch.eye(R))
        assert not B.any()


def test_everything_that_matters_is_in_the_key(folder: Path, decomposed: list[object]) -> None:
    weight = make_weight()
    changed = weight.clone()
    changed[3, 5] = torch.nextafter(changed[3, 5], torch.tensor(9.0))
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    calls = [
        (weight, R, "milora", None),
        (changed, R, "milora", None),
        (weight.double(), R, "milora", None),
        (weight.view(192, 160), R, "milora", None),
        (weight, R + 1, "milora", None),
        (weight, R, "pissa", None),
        (weight, R, "random", seeds[0]),
        (weight, R, "random", seeds[1]),
    ]
    for w, r, init, generator in calls:
        cached_factors(w, r, 1.0, init, generator)  # type: ignore[arg-type]
    assert len(decomposed) == len(calls)


def test_torchs_own_seed_decides_on_random_factors_that_are_kept(folder: Path) -> None:
    def seeded(seed: int, init: str) -> Tensor:
        torch.manual_seed(seed)
        return cached_factors(make_weight(), R, init=init)[0]

    first, second, again = (seeded(seed, "random") for seed in (0, 1, 0))
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert torch.equal(seeded(0, "milora"), seeded(1, "milora"))


def test_layout_does_not_matter(folder: Path, decomposed: list[object]) -> None:
    weight = make_weight()
    cached_factors(weight, R)
    cached_factors(weight.mT.contiguous().mT, R)
    assert len(decomposed) == 1


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def header_damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"Vh"', b'"Vx"'))


def exchanged(path: Path) -> None:
    """Put another weight's whole entry in its place."""
    cached_factors(make_weight(1).view(192, 160), R)
    (other,) = set(path.parent.iterdir()) - {path}
    other.rename(path)


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.filterwarnings("ignore:Decompositions cannot be kept")
@pytest.mark.parametrize("damage", [truncated, emptied, bit_flipped, header_damaged, exchanged, folder_in_its_place])
def test_a_damaged_entry_is_computed_anew(folder: Path, decomposed: list[object], damage: object) -> None:
    weight = make_weight()
    first = cached_factors(weight, R)
    damage(entry(folder))  # type: ignore[operator]
    decomposed.clear()
    with pytest.warns(UserWarning, match=r"is unusable and computed anew"):
        again = cached_factors(weight, R)
    assert decomposed == [SHAPE]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    if damage is not folder_in_its_place:
        cached_factors(weight, R)
        assert decomposed == [SHAPE]  # the entry is whole again


def test_a_folder_that_cannot_be_written(tmp_path: Path, decomposed: list[object]) -> None:
    (tmp_path / "factors").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="Decompositions cannot be kept in .* Set MILORA_CACHE"):
        factors = cached_factors(make_weight(), R)
    assert torch.equal(factors[0], initial_factors(make_weight(), R)[0])


def test_a_failed_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(factor_cache, "save_file", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        cached_factors(make_weight(), R)
    assert list(folder.iterdir()) == []


def test_small_weights_and_loras_start_are_not_kept(folder: Path) -> None:
    cached_factors(torch.randn(16, 16), R)
    cached_factors(make_weight(), R, 1.0, "lora")
    assert not folder.exists()


def test_bad_weights_are_refused_as_ever(folder: Path) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        cached_factors(torch.full(SHAPE, float("nan")), R)
    assert not folder.exists()


@pytest.mark.parametrize("cache", [True, False])
def test_surgery_decomposes_once(folder: Path, decomposed: list[object], cache: bool) -> None:
    layer = nn.Linear(SHAPE[1], SHAPE[0])
    models = [nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0])) for _ in range(2)]
    for model in models:
        model.load_state_dict({"0." + key: x for key, x in layer.state_dict().items()})
        inject(model, LoRAConfig(r=R))
        assert initialize(model, cache=cache) == 1
    assert len(decomposed) == (1 if cache else 2)
    assert folder.exists() == cache
    assert all(torch.equal(x, y) for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_shares_entries_with_the_cpu(folder: Path, decomposed: list[object]) -> None:
    """Would catch a key that depends on the device, and triplets that are not brought back to it."""
    A, B = cached_factors(make_weight(), R)
    C, D = cached_factors(make_weight().cuda(), R)
    assert C.is_cuda
    assert torch.equal(A, C.cpu())
    assert torch.equal(B, D.cpu())
    assert len(decomposed) == 1
