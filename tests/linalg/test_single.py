"""Float32 with refinement, as on GPUs that are slow in float64: the same slices, or none."""

import pytest
import torch
from helpers.decomposition_weights import (
    DTYPES,
    SHAPES,
    R,
    assert_are_triplets,
    assert_is_slice,
    duplicated_rows,
    few_pruned_rows,
    low_rank,
    make_weight,
    nearly_low_rank,
    planted,
    record_certificates,
    zero,
)

from milora_lightning.linalg import devices, single
from milora_lightning.linalg.devices import CPU, Way
from milora_lightning.linalg.single import SingleEigenpairs, single_eigenpairs
from milora_lightning.linalg.singular import SingularSlice, singular_slice


@pytest.fixture
def taken(monkeypatch):
    """Have the CPU decompose as a device does that is slow in float64; record whether what it refined was certified."""
    monkeypatch.setattr(devices, "best_way", lambda device, shape, r: Way(CPU, single=True))
    return record_certificates(monkeypatch, lambda candidate: candidate.uncertainty is not None)


@pytest.mark.parametrize("which", ["minor", "principal", "middle"])
@pytest.mark.parametrize("spectrum", ["gaussian", 1e2, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_full_svd(taken, svd_shapes, shape, dtype, spectrum, which):
    weight = make_weight(shape, spectrum, dtype)
    triplets = singular_slice(weight, R, which)
    assert taken[-1]
    assert all(short <= min(shape) // 2 for short, _ in svd_shapes)
    assert_are_triplets(triplets, weight, R)
    assert_is_slice(triplets, weight, R, which)


@pytest.mark.parametrize("condition", [1e5, 1e7])
def test_what_float32_cannot_tell_apart_is_left_to_float64(taken, condition):
    """Everything around the slice is below float32's rounding of the Gram matrix."""
    weight = make_weight((96, 256), condition)
    triplets = singular_slice(weight, R)
    assert not any(taken)
    assert_is_slice(triplets, weight, R, "minor")


def ill_conditioned(condition, spread):
    """R smallest singular values in a cluster, far below the others, which fall by half from there to the next."""
    spectrum = torch.logspace(0, -1, 160, dtype=torch.float64)
    spectrum[-2 * R : -R] = torch.linspace(4, 2, R, dtype=torch.float64) / condition
    spectrum[-R:] = (1 - spread * torch.arange(R, dtype=torch.float64)) / condition
    return planted((160, 200), spectrum), spectrum


@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-6, 1e-3])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_clusters_of_small_singular_values(taken, condition, spread):
    weight, spectrum = ill_conditioned(condition, spread)
    triplets = singular_slice(weight, R)
    assert any(taken) or condition > 1e4  # float32 need only tell the span that has all of them from the rest
    assert_are_triplets(triplets, weight, R)
    assert_is_slice(triplets, weight, R, "minor")
    torch.testing.assert_close(triplets.S, spectrum[-R:], rtol=1e-8, atol=0)


def test_a_cluster_across_the_edge_of_the_slice(taken):
    spectrum = torch.linspace(2, 1, 160, dtype=torch.float64)
    spectrum[-3 * R :] = 0.5
    weight = planted((160, 200), spectrum)
    triplets = singular_slice(weight, R)
    assert_are_triplets(triplets, weight, R)
    torch.testing.assert_close(triplets.S, spectrum[-R:], rtol=1e-9, atol=0)


@pytest.mark.parametrize("damage", [few_pruned_rows, duplicated_rows, zero, low_rank, nearly_low_rank])
def test_rank_deficient(taken, damage):
    weight = make_weight((160, 160), "gaussian", torch.float64)
    damage(weight)
    assert_are_triplets(singular_slice(weight, R), weight, R)


def test_what_float32_alone_finds_is_refused(taken, monkeypatch):
    """The negative control: without refinement nothing passes, and float32's own SVD is not the slice."""
    weight = make_weight((96, 256), 1e3)
    U, S, Vh = (x.double() for x in torch.linalg.svd(weight, full_matrices=False))
    with pytest.raises(AssertionError):
        assert_is_slice(SingularSlice(U[:, -R:], S[-R:], Vh[-R:]), weight, R, "minor")
    monkeypatch.setattr(single, "PASSES", 0)
    triplets = singular_slice(weight, R)
    assert taken
    assert not any(taken)
    assert_is_slice(triplets, weight, R, "minor")


def neighbours(found):
    return found._replace(vectors=found.vectors.roll(1, dims=1))


def twice_the_same(found):
    found.vectors[:, 1] = found.vectors[:, 0]
    return found


def shifted(found):
    return found._replace(values=found.values + 0.1 * found.values[-1])


@pytest.mark.parametrize("sabotage", [neighbours, twice_the_same, shifted])
def test_wrong_eigenpairs_are_noticed(taken, monkeypatch, sabotage):
    """A device's solver returns what it should not: the bounds, computed after it, say so."""
    solve = single.eigenpairs

    def wrong(G):
        values, vectors = solve(G)
        return sabotage(SingleEigenpairs(values, vectors, None, None))[:2]

    monkeypatch.setattr(single, "eigenpairs", wrong)
    weight = make_weight((96, 256), 1e3)
    triplets = singular_slice(weight, R)
    assert not any(taken)
    assert_is_slice(triplets, weight, R, "minor")


@pytest.mark.parametrize("digits", [2**-10, 2**-14, 0.0])
def test_the_bound_holds_and_is_not_far_too_wide(monkeypatch, digits):
    """Also for products in fewer digits than float32 has, as TensorFloat-32's are."""
    solve = single.eigenpairs
    generator = torch.Generator().manual_seed(0)

    def rounded(G):
        noise = torch.randn(G.shape, generator=generator)
        return solve(G + digits * G.abs().max() * (noise + noise.mT))

    monkeypatch.setattr(single, "eigenpairs", rounded)
    W = make_weight((200, 260), "gaussian", torch.float64)
    energy = W.square().sum()
    found = single_eigenpairs(W, energy)
    vectors = found.vectors.double()
    exact = torch.linalg.matrix_norm(W @ W.mT / energy - vectors * found.values @ vectors.mT, 2)
    skew = torch.linalg.matrix_norm(vectors.mT @ vectors - torch.eye(200, dtype=torch.float64), 2)
    assert exact <= found.error <= 6 * exact
    assert skew <= found.skew <= 6 * skew
    true = torch.linalg.eigvalsh(W @ W.mT / energy)
    assert ((true - found.values).abs() <= found.error + found.skew * found.values.abs()).all()


def test_the_setting_of_float32_products_is_left_as_it_was(taken):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        singular_slice(make_weight((96, 256), 1e3), R)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_setting_of_float32_products_is_left_as_it_was_by_a_solver_that_fails(monkeypatch):
    within = []

    def fail(G):
        within.append(torch.get_float32_matmul_precision())
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(single, "eigenpairs", fail)
    W = make_weight((96, 256), 1e3, torch.float64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):
            single_eigenpairs(W, W.square().sum())
        assert (within, torch.get_float32_matmul_precision()) == (["highest"], "high")
    finally:
        torch.set_float32_matmul_precision(before)
