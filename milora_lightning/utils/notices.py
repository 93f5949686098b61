"""Notices of other projects that tell users of the command line nothing: each is left out by itself, with the reason.

Whatever is not listed here is shown, warnings of the same projects included.
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
        # What devices there are not, and are: the screen and the config say on which the run is.
        r"(GPU|TPU|HPU|IPU) available: ",
        # Advertisements.
        r"💡 Tip: ",
        # Done for the length of the schedule, and quick.
        r"Loading `train_dataloader` to estimate",
        # Shown by the progress, or by the command's own line at the end.
        r"`Trainer.fit` stopped: ",
        r"\s*Detected KeyboardInterrupt",
        r"Restor(ing|ed all) states from the checkpoint",
    ],
    # The package says it of each prompt that is too long, and with how many tokens.
    "transformers.generation.stopping_criteria": ["This is a friendly reminder"],
    # How its 8-bit kernels work, whatever the model's dtype is.
    "bitsandbytes.autograd._functions": ["MatMul8bitLt: inputs will be cast"],
    # A default of its own, said at every save.
    "lightning.pytorch.trainer.connectors.checkpoint_connector": ["`weights_only` was not set"],
    # It is in the config.
    "lightning.fabric.utilities.seed": ["Seed set to"],
    # Of MLflow's first run in a folder.
    "lightning.pytorch.loggers.mlflow": [r"Experiment with name .* not found\. Creating it"],
    "mlflow.store.db.utils": ["Creating initial MLflow database tables", "Updating database tables"],
}
"""Beginnings of messages, as regular expressions, by the name of their logger."""

WARNED = [
    # The default logger writes CSV files where tensorboard is not installed, which is as good.
    r"Starting from v1\.9\.0, `tensorboardX` has been removed",
    # Between torch and Lightning.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Examples are tokenized before training; workers would only copy them about.
    r"The '\w+' does not have many workers",
    # Also where nothing but a logger's files is there; the command says itself when checkpoints are replaced.
    r"Checkpoint directory .* exists and is not empty",
    # There is no validation data, which the command says itself, or it has an error of its own for no data.
    r"Total length of `\w+` across ranks is zero",
    # A short run: the screen shows every step.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # It is the CLI's own, and in the config that it saves.
    r"No seed found, seed set to",
    # They are summed over all ranks before they are logged.
    r"It is recommended to use `self\.log\('(val|test)_\S+', \.\.\., sync_dist=True\)`",
    # Between transformers and what calls it.
    r"`gradient_checkpointing_enable` is deprecated",
]
"""Beginnings of warnings, as regular expressions."""


class _LeftOut(logging.Filter):
    def __init__(self, beginnings: list[str]) -> None:
        super().__init__()
        self.pattern = re.compile("|".join(beginnings))

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep what is not listed."""
        return self.pattern.match(record.getMessage()) is None


def leave_out() -> None:
    """Leave out what is listed, and the places in this package that warn; once is enough, and twice does no harm."""
    for name, beginnings in LOGGED.items():
        _filter(name, beginnings)
    for beginning in WARNED:
        warnings.filterwarnings("ignore", message=beginning)
    if not isinstance(warnings.formatwarning, _WithoutPlace):
        warnings.formatwarning = _WithoutPlace(warnings.formatwarning)


class _WithoutPlace:
    """Writes this package's warnings without the line of its code that they come from; others stay as they are."""

    def __init__(self, others: Callable[..., str]) -> None:
        self.others = others

    def __call__(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if PACKAGE in Path(filename).parents:
            return f"warning: {message}\n"
        return self.others(message, category, filename, lineno, line)


def leave_out_kernels() -> None:
    """Leave out one line, wherever the package is imported, because PEFT's import of bitsandbytes brings it.

    It says that a kernel for 4-bit models was not found, also where nothing is quantized.
    """
    _filter("bitsandbytes.backends.cpu.ops", ["Failed to load CPU gemm_4bit_forward"])


def _filter(name: str, beginnings: list[str]) -> None:
    logger = logging.getLogger(name)
    if not any(isinstance(f, _LeftOut) for f in logger.filters):
        logger.addFilter(_LeftOut(beginnings))


def leave_out_bars() -> None:
    """Leave out bars of loading and tokenizing: the run's own screen moves meanwhile, and two would overwrite it."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
