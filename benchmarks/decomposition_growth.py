"""How the time of a decomposition grows with the weight's size and with r, and what follows for large models.

Normal entries, float32, the minor slice. Sizes are the short side of square weights and of weights of the aspect ratio
of a Llama's feed-forward layers. Exponents are fitted to the upper half of the points. The projection takes the times
measured at k = 4096, and those of k = 8192 by the fitted exponent from there. Sharing among N ranks divides it, as
every rank decomposes its share of the matrices on cores of its own; what they exchange is small.
"""

from __future__ import annotations

import torch
from common import median_seconds, publish, table
from figures import growth_plot

from milora_lightning import singular_slice

SIZES = (256, 512, 1024, 2048, 4096)
RANKS = (8, 16, 32, 64, 128, 256)
ASPECT = 2.6875  # 11008 / 4096
R = 64
RANKS_OF_A_RUN = (1, 8, 64)
# Matrices by (short side, long side), of all layers.
MODELS = {
    "7B (Llama 2)": {(4096, 4096): 32 * 4, (4096, 11008): 32 * 3},
    "70B (Llama 2)": {(8192, 8192): 80 * 2, (1024, 8192): 80 * 2, (8192, 28672): 80 * 3},
}


def decomposition(k: int, n: int, r: int = R) -> float:
    weight = torch.randn(k, n, generator=torch.Generator().manual_seed(0))
    return median_seconds(lambda: singular_slice(weight, r))


def full_svd(k: int) -> float:
    weight = torch.randn(k, k, generator=torch.Generator().manual_seed(0))
    return median_seconds(lambda: torch.linalg.svd(weight, full_matrices=False), rounds=1)


def projected(shape: tuple[int, int], square: list[float], wide: list[float], exponents: dict[str, float]) -> float:
    """Scale the time of the largest measured weight of the nearest kind by k to the fitted exponent."""
    k, n = shape
    kind, times = ("square", square) if n < 1.5 * k else ("wide", wide)
    # A longer long side only adds to the Gram matrix: in proportion, at most.
    stretch = 1.0 if kind == "square" else max(n / k / ASPECT, 1.0)
    return times[-1] * (k / SIZES[-1]) ** exponents[kind] * stretch


def main() -> None:
    decomposition(256, 256)  # a warm-up
    square = [decomposition(k, k) for k in SIZES]
    wide = [decomposition(k, round(k * ASPECT)) for k in SIZES]
    series = {"square": (SIZES, square), "wide": (SIZES, wide)}
    series["torch.linalg.svd, square"] = (SIZES, [full_svd(k) for k in SIZES])
    exponents = growth_plot("decomposition_size", "short side k", series)
    by_rank = growth_plot(
        "decomposition_rank", "r", {"2048×2048": (RANKS, [decomposition(2048, 2048, r) for r in RANKS])}
    )
    fits = [[name, "k", f"{value:.1f}"] for name, value in exponents.items()]
    fits += [[name, "r", f"{value:.1f}"] for name, value in by_rank.items()]
    rows = []
    for model, matrices in MODELS.items():
        total = sum(count * projected(shape, square, wide, exponents) for shape, count in matrices.items())
        rows.append([model, *(f"{total / ranks / 60:.1f} min" for ranks in RANKS_OF_A_RUN)])
    columns = ["surgery, projected", *(f"{n} rank{'s' * (n > 1)} of such a CPU" for n in RANKS_OF_A_RUN)]
    plots = "![time against size](../plots/decomposition_size.png)"
    plots += " ![time against r](../plots/decomposition_rank.png)"
    text = f"{plots}\n\n{table(['weight', 'against', 'exponent'], fits)}\n\n{table(columns, rows)}\n\n"
    text += f"The second table is a projection, not a measurement: all linear layers, r = {R}."
    publish("decomposition_growth", text)


if __name__ == "__main__":
    main()
