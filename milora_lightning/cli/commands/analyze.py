"""``analyze``: shows where updates lie in the spectra of the weights, their size and their effect."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.analysis.effect import EffectMeter
from milora_lightning.analysis.intruders import Intruders
from milora_lightning.analysis.spectra import PRINCIPAL, analyze_model
from milora_lightning.analysis.tables import summary, write_json, write_tables
from milora_lightning.cli.commands.loading import loading
from milora_lightning.data.held_out import pack, read_texts
from milora_lightning.inference import load_module
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import check_output, new_folder
from milora_lightning.utils.modes import eval_mode

BLOCK, BATCH = 256, 4  # as ForgettingMonitor reads text


def analyze(
    ckpt_path: str,
    output: str,
    name_or_path: str | None = None,
    k: int = PRINCIPAL,
    intruder_top_k: int = Intruders.top_k,
    intruder_threshold: float = Intruders.threshold,
    text: str | None = None,
    text_field: str = "text",
    text_tokens: int = 2048,
) -> None:
    """Show where the updates of a checkpoint lie in the spectra of the weights, their size and their effect.

    Writes analysis.json, similarity.csv, spectra.csv, energy.csv and plots of them, and prints averages.

    Args:
        ckpt_path: Checkpoint written by ``fit``.
        output: Folder to create.
        name_or_path: The current location of the base model; by default that of training.
        k: Number of principal singular directions for ρ_k, the share of the update between them.
        intruder_top_k: How many of the largest singular vectors of W + ΔW may be intruder dimensions.
        intruder_threshold: They are intruders if their cosine with each singular vector of W is below this.
        text: Text to measure ‖ΔW x‖ / ‖W x‖ on: a .txt, JSON, JSON lines or Parquet file, or a Hub name.
        text_field: Field that contains the text; not used for .txt files.
        text_tokens: Maximum number of tokens to measure on.
    """
    from milora_lightning.analysis.plots import (
        plot_analysis,  # imports matplotlib, an optional package: fail before any work
    )

    check_output(output)
    rule = Intruders(top_k=intruder_top_k, threshold=intruder_threshold)
    if k < 1:
        raise InvalidInputError(f"k={k} asks about no direction: it must be at least 1.")
    texts = None if text is None else read_texts(text, text_field, "test")
    with loading():
        module, _ = load_module(ckpt_path, name_or_path)
    effects = {} if texts is None else effects_on(module, pack(texts, module.tokenizer, BLOCK, text_tokens))
    matrices = analyze_model(module, k=k, rule=rule, effects=effects)
    settings = {"ckpt_path": ckpt_path, "k": k, "intruder_top_k": rule.top_k, "intruder_threshold": rule.threshold}
    with new_folder(output) as folder:
        write_tables(folder, matrices)
        write_json(folder / "analysis.json", matrices, {**settings, "text": text})
        plot_analysis(folder, matrices)
    Console().print(summary(matrices))
    print(f"Tables and plots are in {output}")


@torch.no_grad()
def effects_on(module: Any, blocks: torch.Tensor) -> dict[str, float]:
    """Measure ‖ΔW x‖ / ‖W x‖ of a language model's layers on blocks of token ids (number, length)."""
    meter = EffectMeter(lora_layers(module), module.device)
    with eval_mode(module), meter.watching():
        for ids in track(torch.split(blocks, BATCH), "Measuring effects", transient=True):
            module.model(input_ids=ids.to(module.device), use_cache=False)
    return {name: value.item() for name, value in meter.effects().items()}
