"""The callback that turns any Lightning run into a MiLoRA run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from milora_lightning.averaging import check_averaging, copy_adapted, start_averages
from milora_lightning.checkpoint import AdapterCheckpoint
from milora_lightning.config import Init, LoRAConfig
from milora_lightning.factors import stack_factors
from milora_lightning.initialization import Batch, initialize
from milora_lightning.peft_format import objection, outermost_models
from milora_lightning.peft_import import load_peft, peft_config
from milora_lightning.sharding import full_tensor, is_sharded
from milora_lightning.strategies import finish, needs_early_start, prepare, restores_late
from milora_lightning.surgery import inject, lora_layers
from milora_lightning.targets import TargetNotFoundError


class MiLoRAInit(Callback):
    """Fine-tune through low-rank adapters that start from each weight's own singular triplets.

    Add it to a Trainer; nothing else in a project changes. Adapters are injected as soon as the model exists, be it
    built in ``__init__``, ``setup`` or ``configure_model``; their factors are computed when fitting starts, on the
    device the strategy has put the weights on, unless a checkpoint has brought them. Everything else is frozen,
    the model computes at the start exactly what it did before, and the factors stay in float32 whatever the
    Trainer's precision. Lightning's callbacks that average weights may stand anywhere in the list: they average
    A and B, each by itself, share the frozen base with the module, and write averaged adapters into checkpoints.

    Args:
        r: Rank of each adapter.
        lora_alpha: Numerator of the scale ``lora_alpha / r``. Defaults to ``r``, the paper's setting; ``"2r"`` is
            twice the rank, whichever that is, the setting of its LoRA baseline.
        lora_dropout: Probability with which an adapter's input features are dropped in training.
        target_modules: Name endings of linear layers, one regular expression for full names, or
            ``"all-linear"`` (every linear layer but the language-model head).
        init: Start of the factors: ``"milora"`` (smallest singular triplets), ``"pissa"`` (largest), ``"middle"``,
            ``"random"``, or ``"lora"`` (A Kaiming-uniform, B zero). ``"full"`` is the baseline without adapters:
            nothing is frozen, and checkpoints are Lightning's own.
        modules_to_save: Name endings of modules to train in full beside the adapters.
        seed: What the random starts derive from. Defaults to the run's seed.
        start_from: PEFT LoRA folder (exported here or by others) to continue from; the arguments above then follow
            the folder.
        cache: Whether to keep the decompositions in the user's cache folder (``$MILORA_CACHE``), so that the next run
            on the same weights needs none.
        rank_pattern: Other ranks for some layers, by regular expressions for the ends of their names, as in PEFT:
            ``{"down_proj": 16}``.
        alpha_pattern: Likewise other values of ``lora_alpha``; a layer that has none of its own has ``lora_alpha``, or
            where that is left out, its rank.

    Raises:
        ValueError: In the constructor for values out of range; in ``setup`` if the targets do not fit the model, or
            the strategy cannot hold adapters.

    To put a checkpoint's adapters on a module outside a Trainer, use :func:`milora_lightning.load_adapter`.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[MiLoRAInit(r=8)], logger=False, enable_progress_bar=False)
    """

    def __init__(
        self,
        r: int = 32,
        lora_alpha: float | Literal["2r"] | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        init: Init | Literal["full"] = "milora",
        modules_to_save: list[str] | None = None,
        seed: int | None = None,
        start_from: str | None = None,
        cache: bool = True,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
    ) -> None:
        self.config: LoRAConfig | None = None
        if start_from is not None:
            self.config = peft_config(start_from)
        elif init != "full":
            alpha = 2.0 * r if lora_alpha == "2r" else lora_alpha
            ranks, alphas = rank_pattern or {}, alpha_pattern or {}
            if lora_alpha == "2r":
                alphas = {**alphas, **{key: 2.0 * rank for key, rank in ranks.items() if key not in alphas}}
            kept = tuple(modules_to_save or ())
            self.config = LoRAConfig(r, alpha, lora_dropout, target_modules, init, kept, ranks, alphas)
        self.seed = seed
        self.start_from = start_from
        self.cache = cache

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject into what exists now, and into what the module's own ``setup`` and ``configure_model`` build."""
        config = self.config
        if config is None:
            return
        prepare(trainer)
        check_averaging(trainer)
        # Tuners train in their own on_fit_start, and Lightning sorts them to the front: the factors have to be there.
        # A new list, because this one is being iterated over.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]
        # Now, because configure_model may shard the model, and parameters cannot be added after that. Targets that
        # are missing now may come with setup or configure_model; the second call insists on them.
        with suppress(TargetNotFoundError):
            inject(pl_module, config)
        _call_after_configure_model(
            pl_module,
            lambda: self._complete(trainer, pl_module, stage, config),
            lambda: copy_adapted(trainer, pl_module, stage),
        )

    def _complete(self, trainer: Trainer, pl_module: LightningModule, stage: str, config: LoRAConfig) -> None:
        inject(pl_module, config)
        AdapterCheckpoint.attach(pl_module, config)
        if self.start_from is not None and not all(layer.initialized for layer in lora_layers(pl_module).values()):
            load_peft(pl_module, self.start_from)
        finish(trainer, pl_module)
        if stage == "fit" and trainer.is_global_zero:
            _warn_of_export(pl_module)
        if stage == "fit" and needs_early_start(trainer):
            self._initialize(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the factors that no checkpoint has brought, and say what was done."""
        if not restores_late(trainer.strategy):
            self._initialize(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do so now, under strategies that restore checkpoints later."""
        self._initialize(trainer, pl_module)

    def _initialize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.monotonic()
        seed = torch.initial_seed() if self.seed is None else self.seed
        track = _progress if trainer.is_global_zero else iter
        ranks = trainer.global_rank, trainer.world_size
        number = initialize(pl_module, seed, track, *ranks, trainer.strategy.root_device, self.cache)
        start_averages(trainer, pl_module)
        if number and self.config is not None:
            summary = _summary(pl_module, self.config, number, time.monotonic() - started)
            if trainer.is_global_zero:
                Console().print(summary)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turn the adapters' dropout on: pretrained models come in eval mode, and Lightning keeps it."""
        self._initialize(trainer, pl_module)  # where there was no sanity check
        for layer in lora_layers(pl_module).values():
            layer.train()


def _call_after_configure_model(
    pl_module: LightningModule, action: Callable[[], object], after_setup: Callable[[], object]
) -> None:
    """Have ``action`` run right after the module's ``configure_model``, overridden or not, whoever calls it.

    No callback hook lies between ``configure_model`` and the strategy's wrapping of the model. Callbacks may call it in
    their ``setup``; when the Trainer does, for the last time, ``after_setup`` runs, too.
    """
    vars(pl_module).pop("configure_model", None)
    own = pl_module.configure_model

    def configure_model() -> None:
        by_trainer = pl_module._current_fx_name == "configure_model"
        if by_trainer:
            vars(pl_module).pop("configure_model", None)
        own()
        if not by_trainer:
            with suppress(TargetNotFoundError):  # as in setup
                action()
            return
        action()
        after_setup()

    pl_module.configure_model = configure_model  # type: ignore[method-assign]


def _progress(batches: Sequence[Batch]) -> Iterator[Batch]:
    columns = TextColumn("Initializing adapters"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[layer]}"), disable=not batches) as bar:
        task = bar.add_task("", total=sum(map(len, batches)), layer="")
        for batch in batches:
            bar.update(task, layer=batch[0][0])
            yield batch
            bar.advance(task, len(batch))
        bar.update(task, layer="")


def _warn_of_export(module: LightningModule) -> None:
    """Say now, and not when training is over, where PEFT will not hold the adapters."""
    for model in outermost_models(module).values():
        if lora_layers(model) and (said := objection(model)):
            warnings.warn(
                f"An export for PEFT will be refused at the end, as PEFT cannot hold these adapters: {said}. A merged "
                "export works; for PEFT, leave these layers out of target_modules.",
                stacklevel=2,
            )


def _summary(module: LightningModule, config: LoRAConfig, number: int, seconds: float) -> Table:
    adapters = lora_layers(module).values()
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    # The frozen initial factors are bookkeeping, not part of the model.
    total = sum(p.numel() for name, p in module.named_parameters() if not name.endswith((".initial_A", ".initial_B")))
    table = Table(title=f"Adapters initialized: {config.init}", title_justify="left", show_header=False)
    for key, value in (
        ("matrices", f"{number}"),
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
    """How far any adapted layer's output is from its base layer's, for normal random input: zero, if all is well."""
    largest = 0.0
    for layer in lora_layers(module).values():
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.lora_A.device)
        weight: torch.Tensor = layer.base_layer.weight
        if is_sharded(layer):  # collecting the factors, and not the weight, to which nothing is written
            A, B = map(full_tensor, stack_factors(*layer.factors))
            change = x @ A.T @ B.T
        elif weight.is_floating_point():
            x = x.to(weight.dtype)
            change = layer(x) - layer.base_layer(x)
        else:  # a quantized layer may repack its weight when it is called outside training
            change = layer.update(x)
        largest = max(largest, change.abs().max().item())
    return largest
