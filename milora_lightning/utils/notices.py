"""Notices of other projects that are of no use on the command line: each is suppressed separately, for a stated reason.

Everything not listed here is shown, including other warnings of the same projects.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from milora_lightning.utils.folders import PACKAGE

LOGGED = {
    "lightning.pytorch.utilities.rank_zero": [
        # Available devices: the display and the config show which one is used.
        r"(GPU|TPU|HPU|IPU) available: ",
        # Advertisements.
        r"💡 Tip: ",
        # A quick computation of the schedule's length.
        r"Loading `train_dataloader` to estimate",
        # Shown by the progress display or in the command's last line.
        r"`Trainer.fit` stopped: ",
        r"\s*Detected KeyboardInterrupt",
        r"Restor(ing|ed all) states from the checkpoint",
    ],
    # This package warns of each prompt that is too long, with its number of tokens.
    "transformers.generation.stopping_criteria": ["This is a friendly reminder"],
    # How its 8-bit kernels compute, with any dtype of the model.
    "bitsandbytes.autograd._functions": ["MatMul8bitLt: inputs will be cast"],
    # A default that it mentions at every save.
    "lightning.pytorch.trainer.connectors.checkpoint_connector": ["`weights_only` was not set"],
    # Part of the saved config.
    "lightning.fabric.utilities.seed": ["Seed set to"],
    # From MLflow's first run in a folder.
    "lightning.pytorch.loggers.mlflow": [r"Experiment with name .* not found\. Creating it"],
    "mlflow.store.db.utils": ["Creating initial MLflow database tables", "Updating database tables"],
}
"""Beginnings of messages, as regular expressions, by logger name."""

WARNED = [
    # Without tensorboard, the default logger writes CSV files, which serves as well.
    r"Starting from v1\.9\.0, `tensorboardX` has been removed",
    # Concerns only torch and Lightning.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Examples are tokenized before training, so workers would only copy them.
    r"The '\w+' does not have many workers",
    # Also shown if the folder only has a logger's files; the command announces replaced checkpoints itself.
    r"Checkpoint directory .* exists and is not empty",
    # There are no validation data, which the command mentions itself, or no data at all, which is an error.
    r"Total length of `\w+` across ranks is zero",
    # A short run; the display shows every step.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # Set by the CLI, and part of the config that it saves.
    r"No seed found, seed set to",
    # The values are summed over all ranks before they are logged.
    r"It is recommended to use `self\.log\('(val|test)_\S+', \.\.\., sync_dist=True\)`",
    # Concerns only transformers and its callers.
    r"`gradient_checkpointing_enable` is deprecated",
]
"""Beginnings of warnings, as regular expressions."""


class _LeftOut(logging.Filter):
    def __init__(self, beginnings: list[str]) -> None:
        super().__init__()
        self.pattern = re.compile("|".join(beginnings))

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep records that are not listed."""
        return self.pattern.match(record.getMessage()) is None


def leave_out() -> None:
    """Suppress the listed notices, and the source lines in this package's warnings; may be called repeatedly."""
    for name, beginnings in LOGGED.items():
        _filter(name, beginnings)
    for beginning in WARNED:
        warnings.filterwarnings("ignore", message=beginning)
    if not isinstance(warnings.formatwarning, _WithoutPlace):
        warnings.formatwarning = _WithoutPlace(warnings.formatwarning)


class _WithoutPlace:
    """Formats this package's warnings without the source line that issued them; leaves others unchanged."""

    def __init__(self, others: Callable[..., str]) -> None:
        self.others = others

    def __call__(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if PACKAGE in Path(filename).parents:
            return f"warning: {message}\n"
        return self.others(message, category, filename, lineno, line)


def leave_out_kernels() -> None:
    """Suppress one line, wherever this package is imported, that comes from PEFT's import of bitsandbytes.

    It reports a missing kernel for 4-bit models, even if nothing is quantized.
    """
    _filter("bitsandbytes.backends.cpu.ops", ["Failed to load CPU gemm_4bit_forward"])


def _filter(name: str, beginnings: list[str]) -> None:
    logger = logging.getLogger(name)
    if not any(isinstance(f, _LeftOut) for f in logger.filters):
        logger.addFilter(_LeftOut(beginnings))


def leave_out_bars() -> None:
    """Suppress progress bars of loading and tokenizing, because they would interfere with the run's display."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
