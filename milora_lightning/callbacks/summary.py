"""Showing what training has changed, with a few figures and answers."""

from __future__ import annotations

from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from milora_lightning.callbacks._patience import Patience
from milora_lightning.metrics.results import Stage, results
from milora_lightning.screen.figures import number
from milora_lightning.screen.samples import Sample, choose, log_samples, table
from milora_lightning.utils.compat.lightning import logged_step
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import inform


class EvaluationSummary(Callback):
    """Shows validation results and a few answers from before and after training, and keeps them for checkpoints.

    The results from before training are those of the Trainer's sanity check. Set ``num_sanity_val_steps=-1`` so that it
    covers the whole validation set; otherwise the two columns are computed on different examples.

    The answers are those that evaluation steps return as ``{"answers": [...]}``, as
    :class:`milora_lightning.CausalLMModule` does: dictionaries with ``prompt``, ``instruction``, ``generation`` and
    ``reference``. After every evaluation they are shown next to their references and passed to the loggers; when
    training ends, they are shown next to the answers to the same prompts before training. When ``validate`` or ``test``
    is called with ``verbose=False``, its results are shown here, in one table for all data loaders.

    Args:
        samples: How many answers to show; 0 for none.
    """

    def __init__(self, samples: int = 3) -> None:
        if samples < 0:
            raise InvalidInputError(f"samples is the number of answers to show and must be at least 0, not {samples}.")
        self.samples = samples
        self.tables = True  # whether to show the results of validate and test
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.shown: list[Sample] = []
        self._answered: list[Sample] = []
        self._patience = Patience()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the results of an earlier run; those of a resumed one come from its checkpoint, after this."""
        if stage == "fit":
            self.before, self.after, self.shown = {}, {}, []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the answers of the last evaluation, and report how many will be generated before training."""
        self._answered = []
        if trainer.state.fn == "fit":
            self._patience.begin(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the answers of a batch."""
        self._keep(outputs)
        if trainer.state.fn == "fit":
            self._patience.answered(len(self._answered))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the answers of the last evaluation."""
        self._answered = []

    on_test_batch_end = on_validation_batch_end

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the results from before training."""
        self.before = _results(trainer, "val")
        self.shown = [_sample(record, "before") for record in choose(self._answered, self.samples)]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the latest results, and show answers."""
        if trainer.sanity_checking:
            return
        self.after = _results(trainer, "val")
        if trainer.state.fn == "fit":
            self._keep_shown()
        self._show(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show results and answers."""
        self._show(trainer, "test")

    def state_dict(self) -> dict[str, Any]:
        """Return the results, for checkpoints and the model cards of exports."""
        return {"before": self.before, "after": self.after, "samples": self.shown}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the results of the run that is resumed."""
        self.before, self.after = state_dict["before"], state_dict["after"]
        self.shown = state_dict.get("samples", [])  # older checkpoints have none

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the results and answers before and after training."""
        if not trainer.is_global_zero:
            return
        console = rich.get_console()  # the console of the progress display, above which this is printed
        changed = [sample for sample in self.shown if {"before", "after"} <= sample.keys()]
        if changed:
            console.print(table(changed, ["before", "after"], "answers before and after training"))
        if self.after:
            results = Table("validation", "before", "after", title_justify="left")
            for name, value in self.after.items():
                before = number(self.before[name]) if name in self.before else "-"
                results.add_row(name.removeprefix("val_"), before, number(value))
            console.print(results)
        elif self.before or sum(trainer.num_val_batches):
            inform(
                f"There are no results from after training: it ended at step {trainer.global_step}, before its first "
                "validation. trainer.val_check_interval sets how often there is one."
            )

    def _keep(self, outputs: Any) -> None:
        answers = outputs.get("answers") if isinstance(outputs, dict) else None
        self._answered += [record for record in answers or () if record.keys() >= _KEYS]

    def _keep_shown(self) -> None:
        """Update the answers to the shown prompts, or choose the prompts in the first evaluation."""
        if not self.shown:
            self.shown = [_sample(record) for record in choose(self._answered, self.samples)]
        answers = {record["prompt"]: record["generation"] for record in self._answered}
        for sample in self.shown:
            if sample["prompt"] in answers:
                sample["after"] = answers[sample["prompt"]]

    def _show(self, trainer: Trainer, stage: Stage) -> None:
        """Show the results of an evaluation, and show and log some of its answers."""
        if not trainer.is_global_zero:
            return
        fitting = trainer.state.fn == "fit"
        loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
        loop = trainer.test_loop if stage == "test" else loop
        console = rich.get_console()
        answered = {record["prompt"]: record for record in self._answered}
        same = [answered[sample["prompt"]] for sample in self.shown if fitting and sample["prompt"] in answered]
        samples = [_sample(record, "answer") for record in same or choose(self._answered, self.samples)]
        at = f"step {trainer.global_step}" if fitting else {"val": "validation", "test": "test"}[stage]
        if samples:
            console.print(table(samples, ["answer"], f"answers, {at}"))
            for logger in trainer.loggers:
                log_samples(logger, samples, logged_step(trainer), stage)
        results = _results(trainer, stage)
        if fitting and results:
            words = (f"{name} {number(value)}" for name, value in results.items())
            console.print(f"Step {trainer.global_step}: {', '.join(words)}", highlight=False)
        elif results and self.tables and not loop.verbose:
            figures = Table(at, "result", title_justify="left")
            for name, value in results.items():
                figures.add_row(name.removeprefix(f"{stage}_"), number(value))
            console.print(figures)


_KEYS = {"prompt", "instruction", "generation", "reference"}


def _sample(record: dict[str, str], answer: str | None = None) -> Sample:
    sample = {key: record[key] for key in ("prompt", "instruction", "reference")}
    return sample if answer is None else {**sample, answer: record["generation"]}


def _results(trainer: Trainer, stage: Stage) -> dict[str, float]:
    return dict(sorted(results(trainer.callback_metrics, stage).items()))
