"""Logging the size of updates and their effect on the outputs of their layers."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.analysis.effect import EffectMeter, mask_of
from milora_lightning.analysis.magnitude import update_size, weight_norms
from milora_lightning.strategies.base import refuse_flat_shards
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import inform


class UpdateMonitor(Callback):
    """Logs at every validation how far the updates have moved the weights, and the outputs of their layers.

    ``update_size`` is ‖ΔW‖_F / ‖W‖_F, averaged over the adapted matrices. ``update_effect`` is ‖ΔW x‖ / ‖W x‖, averaged
    over the inputs x that a layer sees in the first batches of the first validation set (of all ranks, without
    padding), and then over layers. Both are 0 at the start and grow as the model moves away; later work finds that
    forgetting follows the latter. Weights are read once, and the updates ΔW are never computed explicitly. It works
    under DDP and FSDP2. For experts and tensor-parallel layers, only the size is logged.

    Args:
        batches: Number of validation batches per rank on which the effect is measured, at the cost of the adapters'
            part of a forward pass; 0 measures only the size.

    Raises:
        ValueError: If ``batches`` is negative; in ``setup`` under FSDP1.
    """

    def __init__(self, batches: int = 2) -> None:
        if batches < 0:
            raise InvalidInputError(f"batches must be at least 0, not {batches}.")
        self.batches = batches
        self._layers: dict[str, LoRALinear] = {}
        self._norms: list[Tensor] = []
        self._meter: EffectMeter | None = None
        self._watching = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse FSDP1, which keeps factors in flat shards."""
        refuse_flat_shards(trainer.strategy, "UpdateMonitor cannot read the factors")
        self._layers, self._norms = {}, []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a measurement."""
        if not self._layers:
            self._layers = lora_layers(pl_module)
            self._norms = [weight_norms(layer) for layer in self._layers.values()]
            if not self._layers:
                inform("UpdateMonitor measures adapters, and there are none: it logs nothing.")
        self._meter = EffectMeter(self._layers, pl_module.device)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the first batches."""
        if self._meter is not None and dataloader_idx == 0 and batch_idx < self.batches and self._meter.layers:
            if "torch._dynamo" in sys.modules:  # code compiled earlier does not call new hooks
                self._watching.enter_context(torch.compiler.set_stance("force_eager"))
            self._watching.enter_context(self._meter.watching(mask_of(batch)))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop watching."""
        self._watching.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what has been measured."""
        meter, self._meter = self._meter, None
        if meter is None or not self._layers:
            return
        pl_module.log("update_size", update_size(self._layers.values(), self._norms).float())
        if self.batches and meter.layers:
            meter.sums = trainer.strategy.reduce(meter.sums, reduce_op="sum")
            if effects := meter.effects():
                pl_module.log("update_effect", torch.stack([*effects.values()]).mean())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._watching.close()
