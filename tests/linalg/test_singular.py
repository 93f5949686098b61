import math
import warnings

import pytest
import scipy.linalg
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
    orthonormal,
    planted,
    positions,
    power_law,
    pruned_columns,
    pruned_rows,
    rank_one,
    zero,
)

from milora_lightning.linalg import SingularSlice, partial
from milora_lightning.linalg.arguments import Slice
from milora_lightning.linalg.singular import singular_slice


@pytest.mark.parametrize("which", ["minor", "principal", "middle"])
@pytest.mark.parametrize("spectrum", ["gaussian", 1e3, 1e5, 1e7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_full_svd(shape, dtype, spectrum, which):
    weight = make_weight(shape, spectrum, dtype)
    triplets = singular_slice(weight, R, which)
    assert_are_triplets(triplets, weight, R)
    assert_is_slice(triplets, weight, R, which)


@pytest.mark.parametrize("which", ["principal", "middle", "random"])
def test_other_slices_fail_the_minor_test(which):
    weight = make_weight((96, 256), 1e3)
    with pytest.raises(AssertionError):
        assert_is_slice(singular_slice(weight, R, which), weight, R, "minor")


def test_finds_planted_subspaces():
    generator = torch.Generator().manual_seed(3)
    U, V = orthonormal(200, 150, generator), orthonormal(150, 150, generator)
    spectrum = power_law(150, 1e3)
    triplets = singular_slice(U * spectrum @ V.mT, R)
    torch.testing.assert_close(triplets.S, spectrum[-R:], rtol=1e-9, atol=0)
    assert torch.dist(triplets.U @ triplets.U.mT, U[:, -R:] @ U[:, -R:].mT) < 1e-8
    assert torch.dist(triplets.Vh.mT @ triplets.Vh, V[:, -R:] @ V[:, -R:].mT) < 1e-8


@pytest.mark.parametrize("which", ["minor", "principal", "middle"])
@pytest.mark.parametrize("r", [1, 5, 96])
@pytest.mark.parametrize("shape", [(96, 96), (96, 256), (256, 96)])
def test_every_rank(shape, r, which):
    weight = make_weight(shape, "gaussian")
    triplets = singular_slice(weight, r, which)
    assert_are_triplets(triplets, weight, r)
    assert_is_slice(triplets, weight, r, which)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3)])
def test_tiny_weights(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_are_triplets(singular_slice(weight, 1), weight, 1)


def test_whole_spectrum_rebuilds_the_weight():
    weight = make_weight((48, 96), "gaussian", torch.float64)
    U, S, Vh = singular_slice(weight, 48)
    torch.testing.assert_close(U * S @ Vh, weight)


@pytest.mark.parametrize("which", ["minor", "principal", "middle", "random"])
@pytest.mark.parametrize(
    "damage",
    [
        pruned_rows,
        pruned_columns,
        few_pruned_rows,
        duplicated_rows,
        zero,
        low_rank,
        rank_one,
        nearly_low_rank,
    ],
)
@pytest.mark.parametrize("shape", [(96, 96), (96, 256), (256, 96)])
def test_rank_deficient(shape, damage, which):
    weight = make_weight(shape, "gaussian", torch.float64)
    damage(weight)
    triplets = singular_slice(weight, R, which)
    assert_are_triplets(triplets, weight, R)
    if which != "random":
        exact = torch.linalg.svdvals(weight)[positions(96, R, which)]
        torch.testing.assert_close(triplets.S, exact, rtol=1e-6, atol=1e-13 * max(1.0, weight.norm().item()))


@pytest.mark.parametrize("which", ["minor", "principal", "middle"])
@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-6])
def test_clustered_singular_values(spread, which):
    spectrum = 1 - spread * torch.arange(128, dtype=torch.float64)
    weight = planted((128, 160), spectrum)
    triplets = singular_slice(weight, R, which)
    assert_are_triplets(triplets, weight, R)
    torch.testing.assert_close(triplets.S, spectrum[positions(128, R, which)], rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-30, 1e30, 1e170])
def test_scale_does_not_matter(scale):
    weight = make_weight((96, 128), 1e3, torch.float64)
    plain, scaled = singular_slice(weight, R), singular_slice(weight * scale, R)
    torch.testing.assert_close(scaled.S / scale, plain.S, rtol=1e-6, atol=0)
    assert torch.dist(scaled.Vh.mT @ scaled.Vh, plain.Vh.mT @ plain.Vh) < 1e-8


@pytest.mark.parametrize("which", ["minor", "principal", "middle"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ordinary_weights_skip_the_full_svd(svd_shapes, shape, which):
    singular_slice(make_weight(shape, 1e3), R, which)
    assert svd_shapes
    assert all(short <= min(shape) // 2 for short, _ in svd_shapes)


def test_a_wider_margin_comes_before_the_full_svd(svd_shapes):
    # Singular values that fall to zero as a random square matrix's do, with one outlier and one straggler.
    spectrum = torch.linspace(1, 1 / 400, 400, dtype=torch.float64)
    spectrum[0], spectrum[-1] = 20, 2.5e-5
    weight = planted((400, 400), spectrum)
    triplets = singular_slice(weight, R)
    assert svd_shapes == [(R + 8, R + 8), (R + 50, R + 50)]
    assert_is_slice(triplets, weight, R, "minor")


@pytest.mark.parametrize("damage", [pruned_rows, few_pruned_rows, zero, nearly_low_rank])
def test_rank_deficient_weights_take_the_full_svd(svd_shapes, damage):
    weight = make_weight((96, 256), "gaussian", torch.float64)
    damage(weight)
    singular_slice(weight, R)
    assert svd_shapes[-1] == (96, 256)


def neighbours(G, low, high, solve):
    return solve(G.clone(), low, high)[0], solve(G, low - 1, high - 1)[1]


def noisy(G, low, high, solve):
    values, vectors = solve(G, low, high)
    return values, vectors + 1e-7 * torch.randn(vectors.shape, dtype=vectors.dtype)


def twice_the_same(G, low, high, solve):
    values, vectors = solve(G, low, high)
    vectors[:, 1] = vectors[:, 0]
    return values, vectors


def no_convergence(G, low, high, solve):
    raise scipy.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("sabotage", [neighbours, noisy, twice_the_same, no_convergence])
def test_wrong_eigenvectors_are_noticed(monkeypatch, svd_shapes, sabotage):
    solve = partial.dense_eigenpairs
    monkeypatch.setattr(partial, "dense_eigenpairs", lambda G, low, high: sabotage(G, low, high, solve))
    weight = make_weight((96, 256), 1e3)
    triplets = singular_slice(weight, R)
    assert svd_shapes[-1] == (96, 256)
    assert_is_slice(triplets, weight, R, "minor")


def test_random_follows_its_generator():
    weight = make_weight((96, 128), "gaussian")
    draw = [singular_slice(weight, R, "random", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(draw[0], draw[1], strict=True))
    assert not torch.equal(draw[0].S, draw[2].S)
    assert_are_triplets(draw[0], weight, R)
    # Distinct indices: every drawn value is one of the spectrum's, and none comes twice.
    spectrum = torch.linalg.svdvals(weight.double())
    index = (draw[0].S[:, None] - spectrum).abs().argmin(dim=1)
    assert len(set(index.tolist())) == R
    torch.testing.assert_close(draw[0].S, spectrum[index])


def test_random_without_a_generator_follows_the_global_seed():
    weight = make_weight((96, 128), "gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = singular_slice(weight, R, "random")
        torch.manual_seed(5)
        second = singular_slice(weight, R, "random")
    assert torch.equal(first.S, second.S)


@pytest.mark.parametrize("which", ["minor", "principal", "middle"])
def test_other_slices_draw_nothing(which):
    state = torch.get_rng_state()
    singular_slice(make_weight((96, 128), 1e3), R, which)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("which", ["minor", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_is_left_alone(dtype, which):
    weight = torch.nn.Parameter(make_weight((96, 96), "gaussian", dtype))
    before = weight.detach().clone()
    triplets = singular_slice(weight, R, which)
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert not any(x.requires_grad for x in triplets)


@pytest.mark.parametrize("shape", SHAPES)
def test_layout_does_not_matter(shape):
    weight = make_weight(shape, 1e3)
    strided = torch.stack([weight, weight], dim=2)[..., 0]
    for view in (weight.mT.contiguous().mT, strided):
        assert not view.is_contiguous()
        triplets = singular_slice(view, R)
        assert_are_triplets(triplets, weight, R)
        assert_is_slice(triplets, weight, R, "minor")


def test_results_do_not_hold_on_to_larger_storage():
    for x in singular_slice(make_weight((96, 256), 1e3), R):
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_transpose_swaps_the_sides():
    weight = make_weight((96, 256), 1e3)
    one, other = singular_slice(weight, R), singular_slice(weight.mT, R)
    torch.testing.assert_close(one.S, other.S, rtol=1e-9, atol=0)
    assert torch.dist(one.U @ one.U.mT, other.Vh.mT @ other.Vh) < 1e-8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("which", ["minor", "principal", "middle"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("large", [0, partial.LARGE])
def test_cuda_agrees(monkeypatch, shape, which, large):
    """Would catch eigenpairs of CUDA in another order, with other digits, or left on another device."""
    monkeypatch.setattr(partial, "LARGE", large)
    weight = make_weight(shape, 1e3)
    triplets = singular_slice(weight.cuda(), R, which)
    assert all(x.is_cuda for x in triplets)
    triplets = SingularSlice(*(x.cpu() for x in triplets))
    assert_are_triplets(triplets, weight, R)
    assert_is_slice(triplets, weight, R, which)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(4096, 11008), (4096, 4096)])
def test_cuda_decomposes_weights_of_a_7b_model(shape):
    """Would catch a solver of cuSOLVER that fails or gives wrong digits at sizes that no test on a CPU has."""
    weight = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the CPU had to do it
        U, S, Vh = singular_slice(weight, 64)
    W, k = weight.double(), min(shape)
    assert S.shape == (64,)
    assert (W @ Vh.mT - U * S).norm() <= 1e-9 * W.norm()
    for rows in (U.mT, Vh):
        assert (rows @ rows.mT - torch.eye(64, device="cuda", dtype=torch.float64)).norm() <= 1e-9
    assert (
        torch.linalg.svdvals(W @ W.mT if k == shape[0] else W.mT @ W)[-64:].sqrt().sub(S).abs().max() <= 1e-5 * S.max()
    )


def with_entries(*values):
    weight = torch.ones(4, 6)
    weight.view(-1)[: len(values)] = torch.tensor(values)
    return weight


@pytest.mark.parametrize(
    ("weight", "r", "which", "message"),
    [
        (torch.ones(4), 1, "minor", r"shape \(4,\) has no singular vectors: pass a matrix"),
        (torch.ones(2, 4, 4), 1, "minor", r"shape \(2, 4, 4\) has no singular vectors"),
        (torch.ones(4, 4, dtype=torch.int8), 1, "minor", r"torch.int8 cannot be decomposed: pass it in a float"),
        (torch.ones(4, 4, dtype=torch.complex64), 1, "minor", r"torch.complex64 cannot be decomposed"),
        (torch.ones(4, 6, device="meta"), 1, "minor", r"meta device has no values: load it"),
        (with_entries(math.nan, math.inf, -math.inf), 1, "minor", r"3 of the weight's 24 entries are NaN or inf"),
        (torch.ones(4, 6), 0, "minor", r"has 4 triplets, not 0: set r from 1 to 4"),
        (torch.ones(4, 6), -1, "minor", r"not -1: set r from 1 to 4"),
        (torch.ones(6, 4), 5, "random", r"shape \(6, 4\) has 4 triplets, not 5: set r from 1 to 4"),
        (torch.ones(0, 4), 1, "minor", r"shape \(0, 4\) has 0 triplets"),
        (torch.ones(4, 6), 1, "last", r"unknown slice 'last': choose one of minor, principal, middle, random"),
    ],
)
def test_errors_name_cause_and_remedy(weight, r, which: Slice, message):
    with pytest.raises(ValueError, match=message):
        singular_slice(weight, r, which)


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3000, 7), (7, 3000)])
def test_narrow_weights_at_each_rank(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, k = torch.randn(shape), min(shape)
    wanted = torch.linalg.svdvals(weight.double())
    for r in {1, max(1, k - 1), k}:
        U, S, Vh = singular_slice(weight, r)
        torch.testing.assert_close(S, wanted[k - r :], rtol=1e-9, atol=0)
        torch.testing.assert_close(weight.double() @ Vh.mT, U * S, rtol=0, atol=1e-9)
