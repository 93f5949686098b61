"""Draw memory and time by model size, from the table that benchmarks/scale.py has put into docs/scale.md: sizes.svg.

python docs/figures/sizes.py
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

PAGE = Path(__file__).parents[1] / "scale.md"
CARD = 80  # GB
BILLIONS = {"B": 1, "T": 1000}
SECONDS = {"s": 1, "min": 60, "h": 3600}


def main() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("<!-- scale -->")[2].partition("<!-- /scale -->")[0].strip()
    lines = [line for line in table.split("\n\n")[0].splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    memory, step = header.index("memory of a GPU"), next(i for i, name in enumerate(header) if name.startswith("step"))
    series: dict[str, list[tuple[float, float, float | None]]] = defaultdict(list)
    for row in rows:
        size = re.match(r"([\d.]+)([BT])", row[0])
        took = re.match(r"([\d.]+) (s|min|h)\b", row[step])
        assert size is not None
        seconds = float(took[1]) * SECONDS[took[2]] if took else None
        gigabytes = float(row[memory].removesuffix(" GB").replace(",", ""))
        series[row[1]].append((float(size[1]) * BILLIONS[size[2]], gigabytes, seconds))
    draw(series)


def draw(series: dict[str, list[tuple[float, float, float | None]]]) -> None:
    mpl.rcParams.update({"svg.hashsalt": "milora", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for gpus, points in series.items():
        points.sort()
        label = f"{gpus} GPU" if gpus == "1" else f"{gpus} GPUs"
        left.loglog([p[0] for p in points], [p[1] for p in points], marker="o", markersize=4, label=label)
        timed = [(p[0], p[2]) for p in points if p[2] is not None]
        right.loglog([t[0] for t in timed], [t[1] for t in timed], marker="o", markersize=4, label=label)
    left.axhline(CARD, color="#6b7280", linestyle="--", linewidth=1)
    left.annotate(f"{CARD} GB", (left.get_xlim()[0], CARD), (3, 3), textcoords="offset points", color="#6b7280")
    left.set(title="memory of a GPU", ylabel="GB", xlabel="billions of parameters")
    right.set(title="time of a step, on any number that fits", ylabel="seconds", xlabel="billions of parameters")
    for axes in (left, right):
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
