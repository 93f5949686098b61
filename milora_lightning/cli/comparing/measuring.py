"""Recording the results of a run of a comparison at every validation, averaged and for single examples."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from milora_lightning.callbacks.choices import ChoiceMonitor
from milora_lightning.comparison.runs import Examples, Row
from milora_lightning.data.batches.images import IMAGES
from milora_lightning.metrics.results import results
from milora_lightning.models.loss import row_losses
from milora_lightning.module import CausalLMModule
from milora_lightning.training.evaluation import Answers, Batch
from milora_lightning.utils.errors import InvalidInputError

LOSS, ACCURACY = "val_loss", "val_accuracy"
SCORES = ("accuracy", "pass@1")
"""Names that metrics with several results use for the one that scores a single answer."""


class MeasuredModule(CausalLMModule):
    """Keeps the loss of each validation example, and the score of its answer, in the order of the data loader."""

    losses: list[tuple[Tensor, Tensor]]
    scores: list[float]
    _validates = False  # other evaluations of the loss, such as for the statistics of a start, need its gradient

    def on_validation_epoch_start(self) -> None:
        """Discard the previous validation."""
        super().on_validation_epoch_start()
        self.losses, self.scores = [], []

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the loss as usual; in validation, separately for each example."""
        if not self._validates:
            return super().loss(batch)
        losses, tokens = row_losses(self._built(), batch["input_ids"], batch["labels"], **batch.get(IMAGES, {}))
        self.losses.append((losses, tokens))
        return losses.sum(), tokens.sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Answers | None:
        """Do the usual validation step, and judge each answer separately."""
        self._validates = True
        try:
            answers = super().validation_step(batch, batch_idx, dataloader_idx)
        finally:
            self._validates = False
        if answers is not None and self.metric is not None:
            found = [self._score(record) for record in answers["answers"]]
            self.scores += [score for score in found if score is not None]
        return answers

    def _score(self, record: dict[str, str]) -> float | None:
        """Return the metric's score of one answer, 1 if it is right; None if none of its results is such a score."""
        metric = self.metric.clone()  # type: ignore[union-attr]
        metric.reset()
        task = [[record["task"]]] if hasattr(metric, "judges") else []
        metric.update([record["generation"]], [record["reference"]], *task)
        found = metric.compute()
        if isinstance(found, dict):
            found = next((found[name] for name in SCORES if name in found), None)
        return None if found is None else float(found)


class Trajectory(Callback):
    """Records the results of every validation, from before training to its end.

    Attributes:
        rows: The results.
        kept: By name of a result, its values on single examples.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._measured: dict[str, list[tuple[int, Tensor]]] = {}
        self._weights: dict[str, Tensor] = {}
        self._index: dict[str, list[int]] = {}
        self._started = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is validation data, before time is spent on training."""
        if not self.rows:
            raise InvalidInputError(
                "Methods are compared by their validation loss, and there is no validation data: set "
                "data.source.validation."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the step, the seconds since the start, and all results of the validation."""
        if self.rows and self.rows[-1]["step"] == trainer.global_step:
            return
        measured = results(trainer.callback_metrics, "val")
        self.rows.append({"step": trainer.global_step, "seconds": time.monotonic() - self._started, **measured})
        for callback in getattr(trainer, "callbacks", []):
            if not isinstance(callback, ChoiceMonitor) or callback.every == "validation" or trainer.global_step == 0:
                self._keep(trainer.global_step, getattr(callback, "examples", {}))
                self._weights |= getattr(callback, "weights", {})
        if isinstance(pl_module, MeasuredModule):
            self._keep_validation(trainer, pl_module)

    def end(self, trainer: Trainer) -> None:
        """Add what was measured after the last validation."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ChoiceMonitor) and callback.every == "end":
                self.rows[-1] |= callback.results
                self._keep(trainer.global_step, callback.examples)

    @property
    def kept(self) -> dict[str, Examples]:
        """The values of results on single examples, in the order of the data."""
        return {name: self._collected(name) for name in self._measured}

    def _keep_validation(self, trainer: Trainer, module: MeasuredModule) -> None:
        loaders: Any = trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        if module.losses:
            sums, tokens = (torch.cat(column).float() for column in zip(*module.losses, strict=True))
            self._weights[LOSS], self._index[LOSS] = tokens, list(loaders[0].sampler)[: len(sums)]
            self._keep(trainer.global_step, {LOSS: sums / tokens.clamp(min=1)})
        if module.scores:
            self._index[ACCURACY] = list(loaders[1].sampler)[: len(module.scores)]
            self._keep(trainer.global_step, {ACCURACY: torch.tensor(module.scores)})

    def _keep(self, step: int, values: dict[str, Tensor]) -> None:
        for name, each in values.items():
            self._measured.setdefault(name, []).append((step, each))

    def _collected(self, name: str) -> Examples:
        steps, values = zip(*self._measured[name], strict=True)
        stacked = torch.stack(values).cpu().double().numpy()
        weights = self._weights.get(name, torch.ones(stacked.shape[1])).cpu().double().numpy()
        index = np.array(self._index.get(name, range(stacked.shape[1])), dtype=np.int64)
        order = np.argsort(index)
        return Examples(stacked[:, order], weights[order], np.array(steps, dtype=np.float64), index[order])
