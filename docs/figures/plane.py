"""Draw learning against forgetting, from the sweeps in benchmarks/results/two_cores.md: plane.svg.

python docs/figures/plane.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / "two_cores.md"
COLOURS = {
    "lora": "#2f9e44",
    "milora": "#e8833a",
    "pissa": "#3b5bdb",
    "random": "#868e96",
    "gaussian x minor": "#0c8599",
    "minor x principal": "#c2255c",
}


def main() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("<!-- comparison -->")[2].partition("<!-- /comparison -->")[0]
    tasks = re.split(r"^\*\*(.+?)\*\*, seeds.*$", section, flags=re.M)[1:] or ["word problems", section]
    mpl.rcParams.update({"svg.hashsalt": "milora", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks) // 2, squeeze=False)[0]
    for axes, task, text in zip(panels, tasks[::2], tasks[1::2], strict=True):
        for method, ends in sweep(text).items():
            learned, forgotten = zip(*ends, strict=True)
            axes.semilogx(forgotten, learned, color=COLOURS.get(method), marker="o", markersize=4, label=method)
        axes.set(title=task, xlabel="forgetting: KL from the base")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("learning: validation loss")
    panels[0].legend(frameon=False)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


def sweep(text: str) -> dict[str, list[tuple[float, float]]]:
    """Return each method's losses and KL divergences in a sweep's table, a pair for each learning rate."""
    table = text.partition("earning-rate sweep")[2]
    _, _, *rows = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("|")]
    points = {}
    for method, *cells in rows:
        pairs = [re.sub(r"[*\[\] ]", "", cell).split(",") for cell in cells if re.search(r"\d", cell)]
        points[method.strip()] = [(float(loss), float(kl)) for loss, kl in pairs]
    return points


if __name__ == "__main__":
    main()
