import pytest
import torch
from helpers.decomposition_weights import (
    DTYPES,
    R,
    assert_are_triplets,
    assert_is_slice,
    duplicated_rows,
    few_pruned_rows,
    low_rank,
    make_weight,
    nearly_low_rank,
    planted,
    pruned_rows,
    record_certificates,
    zero,
)

from milora_lightning.linalg import partial
from milora_lightning.linalg.singular import singular_slice


@pytest.fixture
def krylov(monkeypatch):
    """Send what small weights there are to the Krylov method, and record whether its result was taken."""
    monkeypatch.setattr(partial, "LARGE", 0)
    return record_certificates(monkeypatch, lambda candidate: candidate.cholesky is not None)  # Krylov's comes with it


@pytest.mark.parametrize("spectrum", ["gaussian", 1e3, 1e5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(200, 200), (200, 260), (260, 200)])
def test_krylov_equals_the_full_svd(krylov, shape, dtype, spectrum):
    weight = make_weight(shape, spectrum, dtype)
    triplets = singular_slice(weight, R)
    # The Gram matrix has too few digits for the one, and the smallest of the other do not stand out.
    assert krylov[0] or spectrum == 1e5 or (spectrum == "gaussian" and shape[0] != shape[1])
    assert_are_triplets(triplets, weight, R)
    assert_is_slice(triplets, weight, R, "minor")


def test_krylov_with_outlying_directions(krylov):
    """A few singular values far above the others are usual in language models, and cost digits of the smallest."""
    weight = make_weight((256, 256), "gaussian", torch.float64)
    weight += 1000 * planted((256, 256), torch.linspace(2, 1, 8, dtype=torch.float64))
    triplets = singular_slice(weight, R)
    assert krylov == [True]
    assert_are_triplets(triplets, weight, R)
    assert_is_slice(triplets, weight, R, "minor")


@pytest.mark.parametrize("damage", [pruned_rows, few_pruned_rows, duplicated_rows, zero, low_rank, nearly_low_rank])
def test_krylov_leaves_rank_deficient_weights_to_the_full_svd(krylov, svd_shapes, damage):
    weight = make_weight((160, 160), "gaussian", torch.float64)
    damage(weight)
    triplets = singular_slice(weight, R)
    assert not any(krylov)
    assert svd_shapes[-1] == (160, 160)
    assert_are_triplets(triplets, weight, R)


@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-6])
def test_krylov_with_clustered_singular_values(krylov, spread):
    spectrum = 1 - spread * torch.arange(160, dtype=torch.float64)
    weight = planted((160, 160), spectrum)
    triplets = singular_slice(weight, R)
    assert_are_triplets(triplets, weight, R)
    torch.testing.assert_close(triplets.S, spectrum[-R:], rtol=1e-9, atol=0)


def krylov_neighbours(found):
    values, vectors, L = found
    return values, vectors.roll(1, dims=1) + 1e-3 * torch.randn(vectors.shape, dtype=vectors.dtype), L


@pytest.mark.parametrize("sabotage", [krylov_neighbours, lambda found: None])
def test_wrong_krylov_vectors_are_noticed(krylov, monkeypatch, sabotage):
    solve = partial.smallest_eigenpairs
    monkeypatch.setattr(partial, "smallest_eigenpairs", lambda *args: sabotage(solve(*args)))
    weight = make_weight((200, 200), "gaussian")
    triplets = singular_slice(weight, R)
    assert not any(krylov)
    assert_is_slice(triplets, weight, R, "minor")
