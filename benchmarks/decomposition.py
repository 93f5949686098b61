"""Time, error and memory of decomposing one weight, against the float32 SVD that other implementations take.

The minor slice, r = 64. ``random`` weights have normal entries. ``LLM-like`` ones have what pretrained weights have:
rows and columns of different scale and a few directions far above the rest, with condition numbers of 10⁴ to 10⁶ when
square. The reference is a float64 SVD; the float32 SVD is timed and compared on the float32 weight. Run it for one
shape (``4096x4096``), or for all.
"""

from __future__ import annotations

import multiprocessing
import sys
from functools import partial

import torch
from common import alternate, publish, table

from milora_lightning.linalg.singular import SingularSlice, singular_slice
from milora_lightning.utils import process_memory

SHAPES = {"4096x4096": (4096, 4096), "4096x11008": (4096, 11008), "11008x4096": (11008, 4096)}
R = 64
ROUNDS = 3


def random(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def llm_like(shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(size, generator=generator).div(2).exp() for size in shape)
    left = torch.randn(shape[0], R, generator=generator) / torch.arange(1, R + 1)
    outliers = left @ torch.randn(R, shape[1], generator=generator)
    return torch.randn(shape, generator=generator) * rows[:, None] * columns + outliers


SPECTRA = {"random": random, "LLM-like": llm_like}


def reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the last R triplets of a float64 SVD, after QR of the long side, which changes nothing but the time."""
    W = weight.double()
    tall = W.shape[0] > W.shape[1]
    Q, K = torch.linalg.qr(W if tall else W.mT)
    U, S, Vh = torch.linalg.svd(K)
    U, S, V = Q @ U[:, -R:], S[-R:], Vh[-R:].mT
    return (U, S, V.mT) if tall else (V, S, U.mT)


def projector_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return ‖PPᵀ - QQᵀ‖_F of two (n, r) matrices with orthonormal columns, without forming (n, n)."""
    rest = one - other @ (other.mT @ one)
    return (2**0.5 * torch.linalg.matrix_norm(rest)).item()


def peak_memory(spectrum: str, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Return the peak above the memory before, in float64 copies of the weight; to be run in a fresh process."""
    weight = SPECTRA[spectrum](shape).to(dtype)
    before = process_memory.resident()
    singular_slice(weight, R)
    return (process_memory.peak_resident() - before) / (8 * weight.numel())


def measure(shape: tuple[int, int], spectrum: str) -> list[str]:
    """Return a row of the table, in which slashes separate float32 from bfloat16."""
    full = SPECTRA[spectrum](shape)
    weights = {"float32": full, "bfloat16": full.bfloat16()}
    results: dict[str, SingularSlice] = {}
    singular_values = []

    def ours(name: str) -> None:
        results[name] = singular_slice(weights[name], R)

    def svd() -> None:
        singular_values.append(torch.linalg.svd(full, full_matrices=False).S[-R:])

    seconds = alternate({"svd": svd, **{name: partial(ours, name) for name in weights}}, ROUNDS)
    errors, angles, copies = [], [], []
    for name, weight in weights.items():
        U, S, Vh = reference(weight)
        found = results[name]
        errors.append(f"{((found.S - S).abs() / S).max():.0e}")
        angles.append(f"{max(projector_distance(found.U, U), projector_distance(found.Vh.mT, Vh.mT)):.0e}")
        with multiprocessing.get_context("spawn").Pool(1) as process:
            copies.append(f"{process.apply(peak_memory, (spectrum, shape, weight.dtype)):.1f}")
        if name == "float32":
            theirs = f"{((singular_values[0] - S).abs() / S).max():.0e}"
    times = [f"{seconds[name]:.1f} s" for name in weights]
    factors = [f"{seconds['svd'] / seconds[name]:.1f}×" for name in weights]
    cells = [" / ".join(values) for values in (times, factors, errors, angles, copies)]
    return [spectrum, f"{seconds['svd']:.1f} s", cells[0], cells[1], theirs, *cells[2:]]


def main(names: list[str]) -> None:
    for name in names:
        rows = [measure(SHAPES[name], spectrum) for spectrum in SPECTRA]
        columns = [name.replace("x", "×"), "`torch.linalg.svd`", "`singular_slice`"]
        columns += ["times faster, float32 / bfloat16", "error of its σ", "of ours", "of our projectors", "peak memory"]
        publish(f"decomposition_{name}", table(columns, rows))


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHAPES))
