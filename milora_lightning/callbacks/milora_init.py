"""The callback that turns any Lightning run into a MiLoRA run.

In order: ``setup`` injects the adapters, ``on_fit_start`` computes their factors (or a checkpoint restores them), and
``on_train_start`` turns their dropout on.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Literal

import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from milora_lightning.adapters.initialization import initialize
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.parts import TargetNotFoundError, find_part
from milora_lightning.adapters.surgery import freeze_again, inject, inject_quietly
from milora_lightning.callbacks._checks import check_model, check_optimizers, check_run, say_without_gradient
from milora_lightning.callbacks._configure_model import after_configure_model
from milora_lightning.callbacks._display import summary, trackers
from milora_lightning.callbacks._options import adapter_config, check_start_from
from milora_lightning.callbacks._starting_data import StartingData
from milora_lightning.checkpoint.adapter import AdapterCheckpoint
from milora_lightning.config import DropoutOn, LoRAConfig
from milora_lightning.export.peft_import import load_peft, peft_config
from milora_lightning.strategies.base import calls_parts, needs_early_start, restores_late, shards
from milora_lightning.training.averaging import behind_others, copy_adapted, start_averages
from milora_lightning.training.start_decay import StartDecay


class MiLoRAInit(Callback):
    """Fine-tune with low-rank adapters that start from singular triplets of each weight.

    Add it to a Trainer; nothing else in a project changes. Adapters are injected as soon as the model exists, whether
    it is built in ``__init__``, ``setup`` or ``configure_model``. Their factors are computed when fitting starts, on
    the device where the strategy has placed the weights, unless a checkpoint restores them. Everything else is frozen,
    training starts exactly at the pretrained model, and the factors stay in float32 whatever the Trainer's precision.
    Lightning's weight-averaging callbacks may come before or after it: they average A and B separately, share the
    frozen base with the module, and write averaged adapters into checkpoints.

    BatchNorm, InstanceNorm with running statistics and spectral norm are frozen, too: they use the pretrained model's
    statistics without updating them, so that :func:`milora_lightning.adapters_disabled` gives the pretrained model bit
    for bit even after training. Those in ``modules_to_save`` train as usual. Layers that were already frozen while
    other parameters train serve another purpose (a teacher, a reward model, a perceptual loss). They get no adapters
    unless a name in ``target_modules`` matches frozen layers only. If everything was frozen, this rule does not apply.
    A summary lists the number of adapters in each part of the module.

    Args:
        r: Rank of each adapter.
        lora_alpha: Numerator of the scale ``lora_alpha / r``. Defaults to ``r``, the paper's setting; ``"2r"`` is twice
            the rank, as for the paper's LoRA baseline.
        lora_dropout: Probability of dropping each of an adapter's input features in training.
        target_modules: Name endings of layers, one regular expression for full names, or ``"all-linear"`` (all linear
            layers except language-model heads, layers smaller than ``r`` and those already frozen).
        init: Start of the factors: ``"milora"`` (smallest singular triplets), ``"pissa"``, ``"lora"``, ``"mica"``, …;
            ``"corda"``, ``"eva"``, ``"lora_ga"``, …, from training data; directions with values (``"gaussian x
            minor"``); a registered start; or ``"full"`` for no adapters.
        modules_to_save: Name endings of modules to train in full, in float32, or ``"auto"``: layers that look newly
            initialized or are named like a classifier.
        seed: Seed of random starts; by default the run's seed.
        start_from: Folder of a PEFT LoRA adapter to continue from, exported by this or another tool. Its configuration
            replaces the arguments above.
        cache: Whether to keep decompositions in the user's cache folder (``$MILORA_CACHE``) for later runs on the same
            weights.
        rank_pattern: Different ranks for some layers, by regular expressions for name endings, as in PEFT:
            ``{"down_proj": 16}``.
        alpha_pattern: Different values of ``lora_alpha``, likewise. A layer that no key matches uses ``lora_alpha`` or,
            if that is not given, its rank.
        exclude_modules: Layers that get no adapter even if ``target_modules`` matches them: name endings of layers or
            of their parent modules, or one regular expression for full names.
        module: Name of the submodule to adapt, such as ``"student"`` or ``"generator"``. Names are then relative to it,
            only it is frozen, and the rest of the module is left alone.
        dropout_on: ``"update"``, or ``"product"`` for dropout as in PEFT, with which training does not start at the
            pretrained model; see :class:`milora_lightning.LoRAConfig`.
        use_rslora: Whether the scale is ``lora_alpha / sqrt(r)``, as in rsLoRA.
        decay_to_start: Rate of decay of A and B towards A₀ and B₀ in each step, multiplied by the learning rate. (An
            optimizer's ``weight_decay`` is towards zero, which removes their initial part from the model.)
        statistics_batches: Number of training batches for starts that depend on data; by default 64 for activations
            (``"corda"``, ``"eva"``, …) and 8 for gradients (``"lora_ga"``, ``"lora_one"``).
        preserve: Text that represents the knowledge to preserve, used by ``"corda"`` and ``"lora_null"`` instead of
            training data and by ``"sc_lora"`` in addition: a ``.txt`` file, a JSON, JSON Lines or Parquet file with a
            field ``text``, or a Hub name.
        target_parameters: Name endings of 3-D parameters that get a pair of factors for each of their matrices, as in
            PEFT: ``["experts.gate_up_proj"]``. ``"all-linear"`` includes the experts of a mixture.
        fused_parts: Layers that fuse several projections, each of which gets separate factors, by pattern:
            ``{"qkv_proj": [2048, 512, 512], "gate_up_proj": 2}``, with the rows of each part or the number of equal
            parts.

    Raises:
        ValueError: In the constructor if a value is out of range; in ``setup`` if the targets do not fit the model or
            the strategy does not support adapters; when training starts if the optimizers lack trainable parameters.

    To load a checkpoint's adapters into a module outside a Trainer, use :func:`milora_lightning.load_adapter`.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[MiLoRAInit(r=8)], logger=False, enable_progress_bar=False)
    """

    def __init__(
        self,
        r: int = 32,
        lora_alpha: float | Literal["2r"] | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        init: str = "milora",
        modules_to_save: str | list[str] | None = None,
        seed: int | None = None,
        start_from: str | None = None,
        cache: bool = True,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        exclude_modules: str | list[str] | None = None,
        module: str | None = None,
        dropout_on: DropoutOn = "update",
        use_rslora: bool = False,
        decay_to_start: float = 0.0,
        target_parameters: list[str] | None = None,
        statistics_batches: int | None = None,
        preserve: str | None = None,
        fused_parts: dict[str, int | list[int]] | None = None,
    ) -> None:
        self.config: LoRAConfig | None = None
        check_start_from(start_from, fused_parts, decay_to_start, statistics_batches, preserve)
        if start_from is not None:
            self.config = replace(peft_config(start_from), module=module)
        elif init != "full":
            self.config = adapter_config(
                *(r, lora_alpha, rank_pattern, alpha_pattern),
                *(modules_to_save, exclude_modules, target_parameters, fused_parts),
                lora_dropout=lora_dropout,
                target_modules=target_modules,
                init=init,
                module=module,
                dropout_on=dropout_on,
                use_rslora=use_rslora,
            )
        self.seed = seed
        self.start_from = start_from
        self.cache = cache
        self._decay = StartDecay(decay_to_start, self.config is not None)
        self._stepped: set[Optimizer] = set()
        self._data = StartingData(statistics_batches, preserve, cache)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject adapters into the existing layers, and later into those built in ``setup`` or ``configure_model``."""
        config = self.config
        if stage == "fit" and self.start_from is None:
            self._data.check(trainer, pl_module, config)
        pl_module.milora_config = config  # type: ignore[assignment]  # for a configure_model that shards the model
        if config is None:
            return
        self._decay.check(trainer)
        check_run(trainer, pl_module)
        # Move this callback to the front: tuners, which Lightning sorts first, already train in their on_fit_start and
        # need the factors. Use a new list, because Lightning is iterating over the old one.
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *behind_others(others)]  # type: ignore[attr-defined]
        # Inject now, because configure_model may shard the model, after which no parameters can be added. Missing
        # targets may still be built by setup or configure_model; only the second call requires them. If nothing is
        # trainable yet, wait: that a part is frozen means something only if another part is trainable.
        if shards(trainer.strategy) or any(p.requires_grad for p in pl_module.parameters()):
            with suppress(TargetNotFoundError):
                inject_quietly(pl_module, config)
        after_configure_model(
            pl_module,
            lambda: self._complete(trainer, pl_module, stage, config),
            lambda: copy_adapted(trainer, pl_module, stage),
        )

    def _complete(self, trainer: Trainer, pl_module: LightningModule, stage: str, config: LoRAConfig) -> None:
        inject(pl_module, config)
        check_model(trainer, pl_module, config, stage)
        AdapterCheckpoint.attach(pl_module, config)
        if self.start_from is not None and not all(layer.initialized for layer in lora_layers(pl_module).values()):
            load_peft(find_part(pl_module, config.module), self.start_from)
        if stage == "fit" and needs_early_start(trainer):
            self._initialize(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the factors that were not restored from a checkpoint, and print a summary."""
        if self.config is not None:
            freeze_again(pl_module, self.config)  # the strategy may have replaced layers by synchronized BatchNorm
        if not restores_late(trainer.strategy):
            self._initialize(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the factors here under strategies that restore checkpoints after ``on_fit_start``."""
        self._initialize(trainer, pl_module)

    def _initialize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.monotonic()
        seed = torch.initial_seed() if self.seed is None else self.seed
        track, measured = trackers(trainer)
        options = seed, track, trainer.global_rank, trainer.world_size, trainer.strategy.root_device, self.cache
        number = 0
        for statistics in self._data.groups(trainer, pl_module, measured):
            number += initialize(pl_module, *options, statistics, statistics)
            del statistics  # free the memory for the next group
        number += initialize(pl_module, *options)
        start_averages(trainer, pl_module)
        if number and self.config is not None:
            table = summary(pl_module, self.config, number, time.monotonic() - started)
            if trainer.is_global_zero:
                rich.get_console().print(table)  # the progress bars' console prints above them

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turn the adapters' dropout on: pretrained models are loaded in eval mode, and Lightning keeps it."""
        if self.config is not None:
            check_optimizers(trainer, pl_module, self.config)
        self._stepped.clear()
        self._initialize(trainer, pl_module)  # if there was no sanity check
        for layer in lora_layers(pl_module).values():
            layer.train()
        if self.config is not None:
            self._decay.begin(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the decay hooks from the optimizers."""
        self._decay.end()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Warn of adapters without a gradient in an optimizer's first step; FSDP1's shards do not show them."""
        if self.config is not None and optimizer not in self._stepped and calls_parts(trainer.strategy):
            self._stepped.add(optimizer)
            say_without_gradient(pl_module, optimizer)
