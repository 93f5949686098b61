"""``analyze``: shows where updates lie in the spectra of the weights."""

from __future__ import annotations

from rich.console import Console

from milora_lightning.analysis.spectra import analyze_model, summary, write_tables
from milora_lightning.cli.commands.loading import loading
from milora_lightning.inference import load_module
from milora_lightning.utils.folders import check_output, new_folder


def analyze(ckpt_path: str, output: str, name_or_path: str | None = None) -> None:
    """Show where the updates of a checkpoint lie in the spectra of the weights they update.

    Writes similarity.csv, spectra.csv, energy.csv and plots of them, and prints averages.

    Args:
        ckpt_path: Checkpoint written by ``fit``.
        output: Folder to create.
        name_or_path: Where the base model is now; by default where it was in training.
    """
    from milora_lightning.analysis.plots import (
        plot_analysis,  # imports matplotlib, an optional package: fail before any work
    )

    check_output(output)
    with loading():
        module, _ = load_module(ckpt_path, name_or_path)
    matrices = analyze_model(module)
    with new_folder(output) as folder:
        write_tables(folder, matrices)
        plot_analysis(folder, matrices)
    Console().print(summary(matrices))
    print(f"Tables and plots are in {output}")
