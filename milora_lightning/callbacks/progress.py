"""A run's progress: on a terminal live, in files and pipes in lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from milora_lightning.adapters.initialization import Batch
from milora_lightning.screen.figures import duration, peak_memory
from milora_lightning.screen.pace import Pace, SmoothedLoss
from milora_lightning.screen.state import RunState, Work
from milora_lightning.screen.views import LineView, LiveView, View
from milora_lightning.training.remaining import seconds_left
from milora_lightning.training.schedules import run_length
from milora_lightning.utils.counting import counted

READ_EVERY = 0.5  # seconds: reading a figure from a device waits for it
OWN = ("loss", "train_loss", "lr", "tokens_per_second", "v_num")  # shown in a way of their own


class RunProgress(ProgressBar):
    """Shows what a run is doing, how far it is and when it will be over, with any LightningModule.

    On a terminal a few lines move at its foot from the beginning to the end: the step of how many, the smoothed loss,
    the learning rate, the speed, the peak memory, the time left (evaluations included once their length is known) and
    what the module logs with ``prog_bar=True``; below them what else is going on, such as an evaluation, with
    the token at which the answers are. In a file or a pipe the same is said in plain lines, soon at the beginning and
    once a minute in the long run. A module that logs ``tokens_per_second`` has it shown in place of steps per second.

    Figures are read from the device twice a second at most.

    >>> trainer = Trainer(callbacks=[RunProgress()], logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = RunState()
        self._enabled = True
        self._view: View | None = None
        self._hook: RemovableHandle | None = None
        self._passes = 0
        self._answering = False
        self._first_step = 0
        self._evaluation = 0.0  # seconds that a whole one takes, if one has been seen
        self._loss = SmoothedLoss()
        self._pace = Pace()
        self._read = 0.0

    # Lightning's switches

    def disable(self) -> None:
        """Show nothing, as on all ranks but one."""
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

    def begin(self, name: str) -> None:
        """Say what is going on; the view starts with the first.

        Args:
            name: Such as ``"Loading the model"``.
        """
        self.state.work = Work(name)
        if self._view is None and self._enabled:
            console = rich.get_console()
            live = console.is_terminal and not console.is_dumb_terminal
            self._view = LiveView(console, self.state) if live else LineView(self.state)
            self._view.start()

    def stop(self) -> None:
        """Show nothing more."""
        view, self._view = self._view, None
        if view is not None:
            view.stop()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin: from here on the model is loaded."""
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self._enabled = False
        self.begin("Loading the model")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal to the message."""
        self._close()

    def _close(self) -> None:
        self._unhook()
        self.stop()

    def initializing(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Show how far the decompositions are, in the place of a bar of their own."""
        if batches:
            self.begin("Initializing adapters")
        for batch in batches:
            work = self.state.work
            if work is not None:
                work.total, work.unit, work.note = sum(map(len, batches)), "matrices", batch[0][0]
            self._tick()
            yield batch
            if work is not None:
                work.done += len(batch)
        if batches:  # the last are still being decomposed; then the layers are compared with what they were
            self.begin("Checking the adapters")

    # Training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is there."""
        self.state.work = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here: a trainer may fit several times, tuners do."""
        self._loss, self._pace = SmoothedLoss(), Pace()
        self.state.work = self.state.tokens = self.state.steps = self.state.end = None
        self.state.training = Work("Training", run_length(trainer), "steps", trainer.global_step)
        self._first_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the time, unless the last batch did: loading data is part of a step."""
        self._pace.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the figures, if it is time."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):  # which Lightning has divided
            self._loss.add(loss * trainer.accumulate_grad_batches)
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
        state.metrics = {k: v for k, v in shown.items() if k not in OWN}
        if seconds := self._pace.seconds:
            state.steps = 1 / seconds
            left = seconds_left(trainer, seconds, self._evaluation)
            state.end = None if left is None else time.monotonic() + left

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what stays of it."""
        training, self.state.training, self.state.end = self.state.training, None, None
        if training is not None and training.done > self._first_step:
            self._take_figures(trainer)
            figures = RunState(loss=self.state.loss, tokens=self.state.tokens, memory=self.state.memory).figures
            self.print(f"Trained {training.count} in {duration(training.seconds)}: {', '.join(figures)}")

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
        """Begin to count tokens."""
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
        """Count."""
        self._end_batch()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember how long it took, for the time that is left."""
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
        """There is nothing more to count."""
        self._finish_evaluation()

    on_predict_end = on_test_end

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count batches."""
        self._evaluate("Predicting", trainer.num_predict_batches, pl_module)

    def _evaluate(self, name: str, batches: Sequence[float], pl_module: LightningModule) -> None:
        self._pace.pause()
        self.begin(name)
        work = self.state.work
        if work is not None:
            work.total, work.unit = sum(batches), "batches"
        self._answering = False
        self._unhook()
        models = [child for child in pl_module.modules() if isinstance(child, PreTrainedModel)][:1]
        for model in models:  # generates token by token, each in a pass of its own
            self._hook = model.register_forward_pre_hook(lambda *_: self._pass())

    def _begin_batch(self, batch: Any) -> None:
        self._passes = 0
        self._answering = isinstance(batch, Mapping) and "reference" in batch
        if self.state.work is not None:
            self.state.work.note = f"answering {counted(len(batch['reference']), 'prompt')}" if self._answering else ""
        self._tick()

    def _pass(self) -> None:
        self._passes += 1
        work = self.state.work
        if work is not None and self._answering:
            work.note = f"{work.note.partition(' at')[0]} at token {self._passes}"
        self._tick()

    def _end_batch(self) -> None:
        if self.state.work is not None:
            self.state.work.done += 1
        self._tick()

    def _finish_evaluation(self) -> None:
        self._unhook()
        self.state.work = None

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _tick(self) -> None:
        if self._view is not None:
            self._view.tick()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above what moves."""
        if self._enabled:
            print(*args, **kwargs)
