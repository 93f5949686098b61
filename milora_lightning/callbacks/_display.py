"""What MiLoRAInit shows on the terminal."""

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
"""Passes on pieces of work, one after the other, and shows how far that is."""


def trackers(trainer: Trainer) -> tuple[Track[Batch], Track[int]]:
    """Return what shows the progress of decompositions and of passes over data, on one rank.

    The run's progress bar does if it can, by methods ``initializing`` and ``measuring``.
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
    """Summarize what was done to a module.

    Args:
        module: The module, its adapters initialized.
        config: Their configuration.
        number: How many were initialized.
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
    """Return how far any adapted layer's output is from its base layer's, for normal random input; zero is right.

    This is the update's part, s (B A − B₀A₀) x, which needs the factors only: products with the weights are slow in
    half precision on processors without instructions for it, and would gather shards.
    """
    changes = []
    for layer in lora_layers(module).values():
        A, B = map(full_tensor, stack_factors(*layer.factors, layer.scaling))
        x = torch.randn(4, layer.in_features, device="cpu", generator=torch.Generator().manual_seed(0)).to(A)
        if groups_of(layer.base_layer) > 1:
            A, B = grouped_product(A, B, groups_of(layer.base_layer), layer.r), torch.eye(layer.out_features).to(A)
        changes.append((x @ A.mT @ B.mT).abs().max().float().cpu())
    return max(changes, default=torch.zeros(())).item()
