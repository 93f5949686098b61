"""MiLoRAInit's output on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from milora_lightning.adapters.convolution import grouped_product
from milora_lightning.adapters.coverage import adapters_by_part, coverage
from milora_lightning.adapters.decomposing import Batch
from milora_lightning.adapters.factors import stack_factors
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.linear_layers import groups_of
from milora_lightning.config import LoRAConfig
from milora_lightning.parallel.dtensor import full_tensor

Piece = TypeVar("Piece")
Track = Callable[[Sequence[Piece]], Iterable[Piece]]
"""Wraps an iteration over pieces of work, and shows its progress."""


def trackers(trainer: Trainer) -> tuple[Track[Batch], Track[int]]:
    """Return functions that show the progress of decompositions and of passes over data, on one rank.

    These are the methods ``initializing`` and ``measuring`` of the run's progress bar, if it has them.
    """
    if not trainer.is_global_zero:
        return iter, iter
    bar = trainer.progress_bar_callback
    return getattr(bar, "initializing", progress), getattr(bar, "measuring", passes)


def progress(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Show the progress of the decompositions."""
    columns = TextColumn("Initializing adapters"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[layer]}"), disable=not batches) as bar:
        task = bar.add_task("", total=sum(map(len, batches)), layer="")
        for batch in batches:
            bar.update(task, layer=batch[0][0])
            yield batch
            bar.advance(task, len(batch))
        bar.update(task, layer="")


def passes(numbers: Sequence[int]) -> Iterator[int]:
    """Show the progress of a pass over data."""
    columns = TextColumn("Statistics of data"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as bar:
        yield from bar.track(numbers)


def summary(module: LightningModule, config: LoRAConfig, number: int, seconds: float) -> Table:
    """Return a table that summarizes the adapters of a module.

    Args:
        module: The module, its adapters initialized.
        config: Their configuration.
        number: How many matrices were initialized.
        seconds: How long that took.
    """
    adapters = lora_layers(module).values()
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    # The frozen initial factors are bookkeeping, not part of the model.
    total = sum(p.numel() for name, p in module.named_parameters() if not name.endswith((".initial_A", ".initial_B")))
    table = Table(title=f"Adapters initialized: {config.init}", title_justify="left", show_header=False)
    for key, value in (
        ("matrices", f"{number}"),
        ("adapters", adapters_by_part(module, config)),
        ("adapted", coverage(module, config)),
        (
            "r, lora_alpha, lora_dropout",
            f"{_range([a.r for a in adapters])}, {_range([a.lora_alpha for a in adapters])}, {config.lora_dropout:g}",
        ),
        ("trainable parameters", f"{trainable:,} of {total:,} ({trainable / total:.2%})"),
        ("time", f"{seconds:.1f} s"),
        ("largest change of an output", f"{_largest_change(module):g}"),
    ):
        table.add_row(key, value)
    return table


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


@torch.no_grad()
def _largest_change(module: LightningModule) -> float:
    """Return the largest difference between outputs of adapted and base layers for random inputs, which should be zero.

    Only the update s (B A − B₀A₀) x is computed, from the factors: products with the weights would gather shards, and
    are slow on processors without half-precision instructions.
    """
    changes = []
    for layer in lora_layers(module).values():
        A, B = map(full_tensor, stack_factors(*layer.factors, layer.scaling))
        x = torch.randn(4, layer.in_features, device="cpu", generator=torch.Generator().manual_seed(0)).to(A)
        if groups_of(layer.base_layer) > 1:
            A, B = grouped_product(A, B, groups_of(layer.base_layer), layer.r), torch.eye(layer.out_features).to(A)
        changes.append((x @ A.mT @ B.mT).abs().max().float().cpu())
    return max(changes, default=torch.zeros(())).item()
