"""Draw the singular values of weights of the embedded model, and which of them the starts train: spectrum.svg.

python docs/figures/spectrum.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from milora_lightning.models import load_causal_lm

R = 32
LAYER = 15
KINDS = {"q_proj": "self_attn.q_proj", "down_proj": "mlp.down_proj"}


def main() -> None:
    layers = load_causal_lm("embedded", "float32").get_submodule("model.layers")
    mpl.rcParams.update({"svg.hashsalt": "milora", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, (kind, path) in zip(panels, KINDS.items(), strict=True):
        weight = layers[LAYER].get_submodule(path).weight.detach()
        values = torch.linalg.svdvals(weight.double()).numpy()
        index = range(1, len(values) + 1)
        minor = (values[-R:] ** 2).sum() / (values**2).sum()
        principal = (values[:R] ** 2).sum() / (values**2).sum()
        axes.semilogy(index, values, color="#6b7280", linewidth=1.2)
        axes.semilogy(index[:R], values[:R], color="#3b5bdb", linewidth=3.5)
        axes.semilogy(index[-R:], values[-R:], color="#e8833a", linewidth=3.5)
        for text, point, offset, colour in [
            (f"pissa: {principal:.0%} of the energy", (R, values[R]), (45, -2), "#3b5bdb"),
            (f"milora: {minor * 100:.1g}% of it", (len(values) - R, values[-R]), (-130, -14), "#c2601a"),
        ]:
            line = {"arrowstyle": "-", "color": colour}
            axes.annotate(text, point, offset, textcoords="offset points", color=colour, va="center", arrowprops=line)
        axes.set(title=f"{kind}, {weight.shape[0]}×{weight.shape[1]}", xlabel="index")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("singular value")
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
