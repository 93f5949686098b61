"""What training has changed, in a few figures."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table


class EvaluationSummary(Callback):
    """Prints the validation results from before training and from its end, and keeps them in checkpoints.

    The first figures are those of the check that the Trainer runs before training; let it see the whole validation
    set with ``num_sanity_val_steps=-1``, or the two columns are over different examples.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the results from before training."""
        self.before = _results(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the latest results."""
        if not trainer.sanity_checking:
            self.after = _results(trainer)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the results, for the checkpoint and what is exported from it."""
        return {"before": self.before, "after": self.after}

    def load_state_dict(self, state_dict: dict[str, dict[str, float]]) -> None:
        """Take the results of the run that is resumed."""
        self.before, self.after = state_dict["before"], state_dict["after"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print both."""
        if trainer.is_global_zero and self.after:
            table = Table("validation", "before", "after", title_justify="left")
            for name, value in self.after.items():
                before = f"{self.before[name]:.4g}" if name in self.before else "-"
                table.add_row(name.removeprefix("val_"), before, f"{value:.4g}")
            Console().print(table)


def _results(trainer: Trainer) -> dict[str, float]:
    return {k: v.item() for k, v in sorted(trainer.callback_metrics.items()) if k.startswith(("val_", "forgetting_"))}
