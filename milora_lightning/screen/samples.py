"""Sample answers: choosing a few examples, and showing them on a terminal and in loggers."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from milora_lightning.utils.markdown import table as markdown
from milora_lightning.utils.printable import printable

Sample = dict[str, str]
"""An example's prompt, instruction and reference, and its answers under keys such as ``"before"`` and ``"after"``."""

MAX_CHARS = 240  # of a text on the terminal
LABELS = {"instruction": "prompt", "reference": "reference"}


def choose(samples: Iterable[Sample], number: int) -> list[Sample]:
    """Choose a few samples by a hash of their prompts: always the same ones, whatever their order and number.

    Args:
        samples: The samples.
        number: How many to choose.

    >>> samples = [{"prompt": f"What is 1 plus {i}?"} for i in range(9)]
    >>> choose(samples, 2) == choose(samples[::-1], 2)
    True
    """
    unique = {sample["prompt"]: sample for sample in samples}
    return sorted(unique.values(), key=lambda sample: (zlib.crc32(sample["prompt"].encode()), sample["prompt"]))[
        :number
    ]


def shorten(text: str, length: int = MAX_CHARS) -> str:
    r"""Put a text on one line, safe to print on a terminal, and cut off the end if it is too long.

    >>> shorten("one\n two"), shorten("one two three", 8), shorten(" ")
    ('one two', 'one two…', '(nothing)')
    """
    text = printable(" ".join(text.split()))
    return (text if len(text) <= length else text[: length - 1] + "…") or "(nothing)"


def table(samples: Sequence[Sample], answers: Sequence[str], title: str) -> RenderableType:
    """Show prompts, references and answers below each other.

    Args:
        samples: At least one sample.
        answers: Keys of the answers to show, such as ``"before"`` and ``"after"``.
        title: Title above the table.
    """
    grid = Table(show_header=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for sample in samples:
        labels = {**LABELS, **{answer: answer for answer in answers if answer in sample}}
        for key, label in labels.items():
            # A Text, so that Rich does not read brackets as markup.
            grid.add_row(label, Text(shorten(sample[key]), style="bold" if key == answers[-1] else ""))
        grid.add_section()
    return Group(Text(title, style="bold"), grid)  # a title of the table itself would wrap at the table's width


def log_samples(logger: Logger, samples: Sequence[Sample], step: int, stage: str) -> None:
    """Log samples as a table, as text, or for CSVLogger to ``samples.jsonl`` next to its files.

    Args:
        logger: Any logger of Lightning; nothing is logged to one that supports none of these.
        samples: Samples with the keys ``instruction``, ``reference`` and ``answer``.
        step: The step of the metrics that are logged with them.
        stage: ``"val"`` or ``"test"``.
    """
    columns = ["instruction", "reference", "answer"]
    rows = [[sample[column] for column in columns] for sample in samples]
    name = f"{stage}_samples"
    if isinstance(logger, WandbLogger):
        logger.log_table(name, columns=columns, data=rows, step=step)
    elif isinstance(logger, MLFlowLogger):
        data = {column: list(values) for column, values in zip(columns, zip(*rows, strict=True), strict=True)}
        experiment: Any = logger.experiment
        experiment.log_table(logger.run_id, {"step": [step] * len(rows), **data}, f"{name}.json")
    elif isinstance(logger, TensorBoardLogger):
        experiment = logger.experiment
        experiment.add_text(name, markdown(columns, rows), step)
    elif isinstance(logger, CSVLogger):
        files = get_filesystem(logger.log_dir)  # possibly remote, like the logger's files
        files.makedirs(logger.log_dir, exist_ok=True)
        path = os.path.join(logger.log_dir, "samples.jsonl")
        mode = "a" if files.exists(path) else "w"  # some file systems can append only to existing files
        with files.open(path, mode, encoding="utf-8") as file:
            for row in rows:
                record: Mapping[str, Any] = {"step": step, "stage": stage, **dict(zip(columns, row, strict=True))}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
