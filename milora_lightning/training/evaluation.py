"""Evaluation of a module: its loss per token, and the score of its answers against references."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import Metric

from milora_lightning.data import SFTDataModule
from milora_lightning.data.batches.batching import TEXT_COLUMNS
from milora_lightning.metrics import AnswerAccuracy, TaskAccuracy
from milora_lightning.metrics.losses import MeanLoss
from milora_lightning.training.optimization import OptimizedModule

Batch = dict[str, Any]
Answers = dict[str, list[dict[str, str]]]


class EvaluatedModule(OptimizedModule):
    """A module that logs its loss and the score of its answers in validation and test.

    A batch that has a ``reference`` is answered, and the answers go to the metric; any other batch adds to the loss.
    Subclasses define :meth:`loss` and :meth:`answer`.

    Args:
        optimizer: See :class:`OptimizedModule`.
        lr_scheduler: See :class:`OptimizedModule`.
        warmup_steps: See :class:`OptimizedModule`.
        lr_scheduler_kwargs: See :class:`OptimizedModule`.
        learning_rate: See :class:`OptimizedModule`.
        metric: Scores answers against references; by default the result of :meth:`configure_metric`.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: str,
        warmup_steps: int | float,
        lr_scheduler_kwargs: dict[str, Any] | None,
        learning_rate: float | None,
        metric: Metric | None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, warmup_steps, lr_scheduler_kwargs, learning_rate)
        self.eval_loss = MeanLoss()
        self.metric = metric
        self._metric_from_data = metric is None
        self._answered = False  # whether this evaluation had batches to answer

    @property
    def sft_data(self) -> SFTDataModule | None:
        """The Trainer's data module, if it is an :class:`milora_lightning.SFTDataModule`."""
        datamodule = getattr(self._trainer, "datamodule", None)
        return datamodule if isinstance(datamodule, SFTDataModule) else None

    def setup(self, stage: str) -> None:
        """Choose the metric."""
        super().setup(stage)
        if self._metric_from_data:
            self.metric = self.configure_metric()

    def configure_metric(self) -> Metric | None:
        """Return the default metric, that of the data. Override this to score answers differently."""
        return AnswerAccuracy() if self.sft_data is None else self.sft_data.metric()

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the sum of the losses of a batch's supervised tokens, and the number of these tokens."""
        raise NotImplementedError

    def answer(self, batch: Batch) -> list[str]:
        """Answer the prompts of a batch."""
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Answers | None:
        """Add a batch to the loss, or its answers to the metric.

        Returns:
            For a batch that was answered, the records of :meth:`predict_step` under the key ``answers``.
        """
        return self._evaluation_step(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Answers | None:
        """Do the same as :meth:`validation_step`, for the test set."""
        return self._evaluation_step(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, str]]:
        """Answer the prompts of a batch.

        Returns:
            One record for each example with the keys ``prompt``, ``instruction``, ``generation``, ``reference`` and
            ``task``.
        """
        return _records(batch, self.answer(batch))

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        self._reset_metrics()

    def on_test_epoch_start(self) -> None:
        """Reset the metrics."""
        self._reset_metrics()

    def on_validation_epoch_end(self) -> None:
        """Log the results of validation."""
        self._log_results("val")

    def on_test_epoch_end(self) -> None:
        """Log the results of the test."""
        self._log_results("test")

    def _evaluation_step(self, batch: Batch) -> Answers | None:
        if "reference" not in batch:
            total, tokens = self.loss(batch)
            self.eval_loss.update(total, tokens)
            return None
        self._answered = True
        records = _records(batch, self.answer(batch))
        keys = ["generation", "reference", *(["task"] if isinstance(self.metric, TaskAccuracy) else [])]
        if records and self.metric is not None:
            self.metric.update(*([record[key] for record in records] for key in keys))
        return {"answers": records}

    def _reset_metrics(self) -> None:
        # At the start rather than the end: states created in the inference mode of a separate validation could not be
        # updated in a validation during fit.
        self.eval_loss.reset()
        if self.metric is not None:
            self.metric.reset()
        self._answered = False

    def _log_results(self, stage: str) -> None:
        loss = self.eval_loss.compute()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.follow(loss)
        self.log_dict({f"{stage}_loss": loss, f"{stage}_perplexity": loss.exp()}, prog_bar=True)
        if self._answered and self.metric is not None:  # the same on all ranks, even those without examples
            result = self.metric.compute()
            results = result if isinstance(result, dict) else {"accuracy": result}
            self.log_dict({f"{stage}_{name}": value for name, value in results.items()}, prog_bar=True)


def _records(batch: Batch, answers: list[str]) -> list[dict[str, str]]:
    """Combine answers with the texts of their batch, without examples that only pad the batch."""
    columns = {"generation": answers, **{column: batch[column] for column in TEXT_COLUMNS}}
    records = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [record for record in records if record["reference"] is not None]
