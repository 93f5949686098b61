"""Time to decompose one weight, against the float32 SVD that other implementations take, and the errors of both.

Random weights in float32, r = 64, the minor slice. The reference is a float64 full SVD.
"""

from __future__ import annotations

import torch
from common import alternate, publish, table

from milora_lightning import singular_slice

SHAPES = ((2048, 2048), (2048, 5632), (5632, 2048))
R = 64


def main() -> None:
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        results: dict[str, torch.Tensor] = {}

        def ours(weight: torch.Tensor = weight, results: dict[str, torch.Tensor] = results) -> None:
            results["ours"] = singular_slice(weight, R).S

        def full(weight: torch.Tensor = weight, results: dict[str, torch.Tensor] = results) -> None:
            results["full"] = torch.linalg.svd(weight, full_matrices=False).S[-R:]

        seconds = alternate({"ours": ours, "full": full}, rounds=3)
        exact = torch.linalg.svdvals(weight.double())[-R:]
        error = {name: ((S.double() - exact).abs() / exact).max().item() for name, S in results.items()}
        times = [f"{seconds['full']:.1f} s", f"{seconds['ours']:.2f} s", f"{seconds['full'] / seconds['ours']:.1f}×"]
        rows.append([f"{shape[0]}×{shape[1]}", *times, f"{error['full']:.0e}", f"{error['ours']:.0e}"])
    columns = ["weight", "`torch.linalg.svd`, float32", "`singular_slice`", "faster", "its largest error", "ours"]
    note = f"r = {R}, medians of 3 alternating rounds; errors of the singular values, relative to a float64 full SVD."
    publish("decomposition", table(columns, rows) + f"\n\n{note}")


if __name__ == "__main__":
    main()
