"""Showing the progress of a run: live on a terminal, line by line in files and pipes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from milora_lightning.adapters.decomposing import Batch
from milora_lightning.models.passes import ForwardPasses
from milora_lightning.screen.figures import duration, peak_memory
from milora_lightning.screen.pace import Pace, SmoothedLoss
from milora_lightning.screen.state import RunState, Work
from milora_lightning.screen.views import View, open_view
from milora_lightning.training.optimization import loss_of_step
from milora_lightning.training.remaining import seconds_left
from milora_lightning.training.schedules import run_length
from milora_lightning.utils.counting import counted

READ_EVERY = 0.5  # seconds; reading a value from the device synchronizes with it
SHOWN_SEPARATELY = ("loss", "train_loss", "lr", "tokens_per_second", "v_num")


class RunProgress(ProgressBar):
    """Shows what a run is doing, how far it is and how long it will take, with any LightningModule.

    On a terminal, a few lines at the bottom are updated throughout the run: the step and the number of steps, the
    smoothed loss, the learning rate, the speed, the peak memory, the time left (including evaluations, once one has
    been timed) and everything that the module logs with ``prog_bar=True``. A line below them shows other work, such as
    an evaluation, with the number of tokens generated so far. In a file or a pipe, the same figures are plain lines,
    frequent at first and later one a minute. If the module logs ``tokens_per_second``, it is shown instead of steps per
    second.

    Figures are read from the device at most twice a second.

    >>> trainer = Trainer(callbacks=[RunProgress()], logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = RunState()
        self._enabled = True
        self._view: View | None = None
        self._passes = ForwardPasses(self._pass)
        self._answering = False
        self._first_step = 0
        self._has_trained = False
        self._evaluation = 0.0  # seconds that a whole evaluation takes; 0 until one has been timed
        self._loss = SmoothedLoss()
        self._pace = Pace()
        self._read = 0.0

    # Lightning's switches

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks but one."""
        self._enabled = False
        self.stop()

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown."""
        return self._enabled

    # Beginning and end

    def begin(self, name: str, total: float | None = None, unit: str = "") -> Work:
        """Begin a piece of work; the first call starts the display.

        Args:
            name: What is being done, such as ``"Loading the model"``.
            total: How much there is to do, if that is known.
            unit: What is counted, such as ``"batches"``.

        Returns:
            The work, which shows how much of it is ``done``.
        """
        work = self.state.work = Work(name, total, unit)
        if self._view is None and self._enabled:
            self._view = open_view(self.state)
        return work

    def stop(self) -> None:
        """Stop the display."""
        view, self._view = self._view, None
        if view is not None:
            view.stop()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the display; the model is loaded next."""
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self._enabled = False
        self.begin("Loading the model")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the display."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the display, so that the error message is not overwritten."""
        self._close()

    def _close(self) -> None:
        self._passes.stop()
        self.stop()

    def initializing(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Show the progress of the decompositions of :func:`milora_lightning.initialize`."""
        if not batches:
            return
        work = self.begin("Initializing adapters", sum(map(len, batches)), "matrices")
        for batch in batches:
            work.note = batch[0][0]
            self._tick()
            yield batch
            work.done += len(batch)
        self.begin("Checking the adapters")  # follows once the last ones have been decomposed

    def measuring(self, numbers: Sequence[int]) -> Iterator[int]:
        """Show the progress of a pass over data, before training."""
        work = self.begin("Collecting statistics of data", len(numbers), "batches")
        for number in numbers:
            self._tick()
            yield number
            work.done += 1

    # Training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the display of loading."""
        self.state.work = None
        self._has_trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting; a Trainer may fit several times, as tuners make it do."""
        self._loss, self._pace = SmoothedLoss(), Pace()
        self.state.work = self.state.tokens = self.state.steps = self.state.end = None
        self.state.training = Work("Training", run_length(trainer), "steps", trainer.global_step)
        self._first_step = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report that a resumed run had nothing left to train; Lightning's own message is suppressed."""
        stopped = trainer.should_stop or not trainer.limit_train_batches
        if trainer.ckpt_path and not self._has_trained and not stopped:
            self.print(
                f"Nothing was left to train: the checkpoint is at step {trainer.global_step:,}, where the run ends. "
                "Raise trainer.max_epochs, or max_steps or max_time if that is what ends it, to train further."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it has been running since the last batch: loading data is part of a step."""
        self._has_trained = True
        self._pace.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the figures if an update is due."""
        if (loss := loss_of_step(trainer, pl_module, outputs)) is not None:
            self._loss.add(loss)
        training = self.state.training
        if training is None:
            return
        new = trainer.global_step - int(training.done)
        if new:
            training.done = trainer.global_step
            self._pace.lap(new)
        now = time.monotonic()
        if now - self._read >= READ_EVERY or training.share == 1.0:
            self._read = now
            self._take_figures(trainer)
        self._tick()

    def _take_figures(self, trainer: Trainer) -> None:
        state = self.state
        shown = {k: v for k, v in trainer.progress_bar_metrics.items() if not isinstance(v, str)}
        loss = self._loss.value()
        state.loss = loss if loss is not None else shown.get("train_loss", shown.get("loss"))
        state.rate = float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else None
        tokens = shown.get("tokens_per_second")
        if tokens is not None:
            state.tokens = tokens if state.tokens is None else 0.9 * state.tokens + 0.1 * tokens
        state.memory = peak_memory(trainer.strategy.root_device)
        state.metrics = {k: v for k, v in shown.items() if k not in SHOWN_SEPARATELY}
        if seconds := self._pace.seconds:
            state.steps = 1 / seconds
            left = seconds_left(trainer, seconds, self._evaluation)
            state.end = None if left is None else time.monotonic() + left

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print one line that sums up the training."""
        training, self.state.training = self.state.training, None
        if training is not None and training.done > self._first_step:
            self._take_figures(trainer)
            figures = RunState(loss=self.state.loss, tokens=self.state.tokens, memory=self.state.memory).figures
            self.print(f"Trained {training.count} in {duration(training.seconds)}: {', '.join(figures)}")
        self.state.end = None  # also what the figures have just foretold

    # Evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count batches."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        if self.state.end is not None:
            self.state.end += self._evaluation
        self._evaluate("Evaluating before training" if trainer.sanity_checking else "Validating", batches, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start counting generated tokens."""
        self._begin_batch(batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        self._end_batch()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember how long the evaluation took, to estimate the time left."""
        work, state = self.state.work, self.state
        whole = not trainer.sanity_checking or list(trainer.num_sanity_val_batches) == list(trainer.num_val_batches)
        if work is not None and whole:
            if state.end is not None:
                state.end += work.seconds - self._evaluation
            self._evaluation = work.seconds
        self._finish_evaluation()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count batches."""
        self._evaluate("Testing", trainer.num_test_batches, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the display of the evaluation."""
        self._finish_evaluation()

    on_predict_end = on_test_end

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count batches."""
        self._evaluate("Predicting", trainer.num_predict_batches, pl_module)

    def _evaluate(self, name: str, batches: Sequence[float], pl_module: LightningModule) -> None:
        self._pace.pause()
        self.begin(name, sum(batches), "batches")
        self._answering = False
        self._passes.watch(pl_module)

    def _begin_batch(self, batch: Any) -> None:
        self._passes.restart()
        self._answering = isinstance(batch, Mapping) and "reference" in batch
        if self.state.work is not None:
            self.state.work.note = f"answering {counted(len(batch['reference']), 'prompt')}" if self._answering else ""
        self._tick()

    def _pass(self, number: int) -> None:
        work = self.state.work
        if work is not None and self._answering:
            work.note = f"{work.note.partition(' at')[0]} at token {number}"
        self._tick()

    def _end_batch(self) -> None:
        self._answering = False  # forward passes that follow are a monitor's
        if self.state.work is not None:
            self.state.work.done += 1
            self.state.work.note = ""
        self._tick()

    def _finish_evaluation(self) -> None:
        self._passes.stop()
        self.state.work = None

    def _tick(self) -> None:
        if self._view is not None:
            self._view.tick()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the live display."""
        if self._enabled:
            print(*args, **kwargs)
