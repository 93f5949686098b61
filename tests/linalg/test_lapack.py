from concurrent.futures import ThreadPoolExecutor

import pytest
import scipy.linalg
import torch

from milora_lightning.linalg import lapack
from milora_lightning.linalg.lapack import symmetric_eigenpairs


def symmetric(spectrum: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64, generator=generator)).Q
    return Q * spectrum @ Q.mT


@pytest.mark.parametrize(
    "spectrum",
    [
        torch.linspace(1, 2, 80, dtype=torch.float64),
        torch.logspace(-10, 0, 80, dtype=torch.float64),
        torch.ones(80, dtype=torch.float64),
        torch.arange(80, dtype=torch.float64) // 20,
    ],
)
@pytest.mark.parametrize(("low", "high"), [(0, 12), (30, 45), (70, 80), (79, 80)])
def test_agrees_with_the_spectrum_and_is_orthonormal(spectrum: torch.Tensor, low: int, high: int) -> None:
    G = symmetric(spectrum)
    values, vectors = symmetric_eigenpairs(G.clone(), low, high)
    torch.testing.assert_close(values, spectrum[low:high], rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(high - low, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(G @ vectors, vectors * values, rtol=0, atol=1e-13)


def test_a_matrix_that_falls_apart_into_blocks() -> None:
    G = torch.block_diag(*(symmetric(torch.arange(1.0, 11, dtype=torch.float64)) for _ in range(4)))
    values, vectors = symmetric_eigenpairs(G.clone(), 0, 6)
    torch.testing.assert_close(values, torch.tensor([1.0, 1, 1, 1, 2, 2], dtype=torch.float64))
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(G @ vectors, vectors * values, rtol=0, atol=1e-12)


def test_threads_do_not_disturb_one_another() -> None:
    matrices = [symmetric(torch.linspace(1, i + 2, 90, dtype=torch.float64)) for i in range(8)]
    alone = [symmetric_eigenpairs(G.clone(), 0, 9)[0] for G in matrices]
    with ThreadPoolExecutor(4) as workers:
        together = list(workers.map(lambda G: symmetric_eigenpairs(G.clone(), 0, 9)[0], matrices))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_a_routine_that_fails_is_named() -> None:
    x = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(scipy.linalg.LinAlgError, match="dsterf returned -1"):
        lapack._call("dsterf", -1, x, x)
