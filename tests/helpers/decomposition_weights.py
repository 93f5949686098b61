"""What the tests of decompositions share: weights of known spectra, damage to them, and what triplets must obey."""

import math

import torch

from milora_lightning.linalg import partial

R = 16
SHAPES = [(160, 160), (96, 256), (256, 96)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def orthonormal(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q


def planted(shape, spectrum, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = len(spectrum)
    return orthonormal(shape[0], k, generator) * spectrum @ orthonormal(shape[1], k, generator).mT


def power_law(k, condition, r=R):
    """Decaying spectrum with a gap at every edge of the minor, middle and principal slices."""
    edges = (r, (k - r) // 2, (k - r) // 2 + r, k - r)
    spectrum = torch.logspace(0, -math.log10(condition / 2 ** len(edges)), k, dtype=torch.float64)
    for edge in edges:
        spectrum[edge:] /= 2
    return spectrum


def make_weight(shape, spectrum, dtype=torch.float32):
    if spectrum == "gaussian":
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return planted(shape, power_law(min(shape), spectrum)).to(dtype)


def positions(k, r, which):
    start = {"minor": k - r, "principal": 0, "middle": (k - r) // 2}[which]
    return slice(start, start + r)


def assert_is_slice(triplets, weight, r, which):
    """Compare with a full SVD in float64: singular values, and subspaces through their projectors."""
    U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    at = positions(len(S), r, which)
    U, S, Vh = U[:, at], S[at], Vh[at]
    torch.testing.assert_close(triplets.S, S, rtol=1e-6, atol=0)
    assert torch.dist(triplets.U @ triplets.U.mT, U @ U.mT) < 1e-8
    assert torch.dist(triplets.Vh.mT @ triplets.Vh, Vh.mT @ Vh) < 1e-8
    assert torch.dist(triplets.U * triplets.S @ triplets.Vh, U * S @ Vh) < 1e-8 * weight.double().norm()


def assert_are_triplets(triplets, weight, r):
    """Check what defines singular triplets, which holds where single vectors and even subspaces are free."""
    U, S, Vh = triplets
    W = weight.detach().double()
    assert U.shape == (W.shape[0], r)
    assert S.shape == (r,)
    assert Vh.shape == (r, W.shape[1])
    assert all(x.dtype == torch.float64 and x.is_contiguous() and not x.requires_grad for x in triplets)
    eye = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(U.mT @ U, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(Vh @ Vh.mT, eye, rtol=0, atol=1e-12)
    assert (S >= 0).all()
    assert (S.diff() <= 0).all()
    tolerance = 1e-9 * W.norm().item()
    torch.testing.assert_close(W @ Vh.mT, U * S, rtol=0, atol=tolerance)
    torch.testing.assert_close(W.mT @ U, Vh.mT * S, rtol=0, atol=tolerance)


def pruned_rows(weight):
    weight[10:40] = 0


def pruned_columns(weight):
    weight[:, 5:75] = 0


def few_pruned_rows(weight):
    weight[7:10] = 0


def duplicated_rows(weight):
    weight[60:90] = weight[:30]


def zero(weight):
    weight.zero_()


def low_rank(weight):
    weight.copy_(planted(weight.shape, torch.linspace(2, 1, 20, dtype=torch.float64)))


def rank_one(weight):
    weight.copy_(torch.ones_like(weight))


def nearly_low_rank(weight):
    spectrum = torch.full((min(weight.shape),), 1e-12, dtype=torch.float64)
    spectrum[:20] = 1
    weight.copy_(planted(weight.shape, spectrum))


def record_certificates(monkeypatch, concerned):
    """Return a list to which each decomposition adds whether a candidate was certified, if ``concerned`` by it."""
    found = []
    certified = partial.certified_triplets

    def record(*args):
        triplets = certified(*args)
        if concerned(args[-1]):
            found.append(triplets is not None)
        return triplets

    monkeypatch.setattr(partial, "certified_triplets", record)
    return found
