"""Plots of analyses and comparisons, drawn without a display."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from milora_lightning.analysis.spectra import MatrixAnalysis
from milora_lightning.analysis.tables import averages, by_type
from milora_lightning.utils.errors import MissingPackageError

try:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
except ModuleNotFoundError as error:
    raise MissingPackageError('Plots need the package matplotlib: pip install "milora-lightning[plots]"') from error

Draw = Callable[[Any, list[MatrixAnalysis]], None]


def plot_analysis(folder: Path, matrices: Sequence[MatrixAnalysis]) -> None:
    """Draw spectra.png, similarity.png, sizes.png and energy.png, each with one panel for every module type.

    Args:
        folder: The folder to write to.
        matrices: The analyses.
    """
    groups = by_type(matrices)
    _panels(folder / "spectra.png", groups, "singular values of W and ΔW, a line for each layer", _draw_spectra)
    _panels(folder / "similarity.png", groups, "similarity φ of ΔW with parts of W's spectrum", _draw_similarity)
    energy = "energy of ΔW along W's spectrum, mean over layers; the rest is in W's null spaces"
    _panels(folder / "sizes.png", groups, "size, effect and place of ΔW, and its intruders", _draw_sizes)
    _panels(folder / "energy.png", groups, energy, _draw_energy)


def _draw_spectra(axes: Any, group: list[MatrixAnalysis]) -> None:
    for name, color, values in (
        ("W", "tab:blue", [m.singular_values for m in group]),
        ("ΔW", "tab:orange", [m.delta_singular_values for m in group]),
    ):
        for i, line in enumerate(values):
            axes.plot(range(1, len(line) + 1), line.cpu(), color=color, alpha=0.3, lw=0.8, label=None if i else name)
    axes.set(xscale="log", yscale="log", xlabel="index", ylabel="singular value")


def _draw_similarity(axes: Any, group: list[MatrixAnalysis]) -> None:
    for name, color in (("top", "tab:red"), ("bottom", "tab:blue"), ("random", "tab:gray")):
        axes.plot([m.depth for m in group], [m.similarity[name] for m in group], color=color, marker=".", label=name)
    axes.axhline(averages(group)["expected"], color="black", ls=":", lw=1, label="r / out")
    axes.set(xlabel="block", ylabel="φ", ylim=(0, None))


def _draw_sizes(axes: Any, group: list[MatrixAnalysis]) -> None:
    depths = [m.depth for m in group]
    axes.plot(depths, [m.relative_norm for m in group], color="tab:blue", marker=".", label="‖ΔW‖ / ‖W‖")
    if any(m.effect is not None for m in group):
        effects = [float("nan") if m.effect is None else m.effect for m in group]
        axes.plot(depths, effects, color="tab:orange", marker=".", label="‖ΔWx‖ / ‖Wx‖")
    axes.plot(depths, [m.interference for m in group], color="tab:red", marker=".", label="ρ_k")
    axes.set(xlabel="block", ylim=(0, None))
    counts = axes.twinx()
    counts.bar(depths, [m.intruders for m in group], color="tab:gray", alpha=0.3)
    counts.set(ylabel="intruders", ylim=(0, max(4, *(m.intruders for m in group))))


def _draw_energy(axes: Any, group: list[MatrixAnalysis]) -> None:
    for name, color in (("left", "tab:blue"), ("right", "tab:orange")):
        each = [getattr(m, f"{name}_energy").cpu() for m in group]
        bins = max(map(len, each))  # layers with the same name may have different sizes; small ones have fewer bins
        shares = torch.stack([rebinned(energy, bins) for energy in each]).mean(0)
        edges = [i / len(shares) for i in range(len(shares) + 1)]
        axes.stairs(shares, edges, color=color, label=f"{name} singular vectors")
    axes.axhline(1 / len(shares), color="black", ls=":", lw=1, label="evenly spread")
    axes.set(xlabel="place in the spectrum (1: smallest)", ylabel="share of ‖ΔW‖²", ylim=(0, None))


def rebinned(shares: torch.Tensor, bins: int) -> torch.Tensor:
    """Show shares in a few bins as if they were spread evenly in more.

    >>> rebinned(torch.tensor([0.25, 0.75]), 4)
    tensor([0.1250, 0.1250, 0.3750, 0.3750])
    """
    places = (torch.arange(bins) + 0.5) * len(shares) / bins
    return shares[places.long()] * len(shares) / bins


def _panels(path: Path, groups: dict[str, list[MatrixAnalysis]], title: str, draw: Draw) -> None:
    rows = -(-len(groups) // 4)
    columns = -(-len(groups) // rows)  # rows of nearly equal length
    with new_figure(path, 3.6 * columns, 3 * rows + 0.7) as figure:
        for number, (name, group) in enumerate(groups.items(), 1):
            axes = figure.add_subplot(rows, columns, number, title=name)
            draw(axes, group)
        legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        for handle in legend.legend_handles:
            handle.set(alpha=1, linewidth=1.5)
        figure.suptitle(title)


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a new figure and save it to ``path`` afterwards; width and height are in inches.

    Args:
        path: The file to write.
        width: Width in inches.
        height: Height in inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    figure.savefig(path, dpi=130)
