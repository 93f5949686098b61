"""A few answers to look at: which, on a terminal, and in loggers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from milora_lightning.utils.markdown import table as markdown
from milora_lightning.utils.printable import printable

Sample = dict[str, str]
"""Of an example its prompt, instruction and reference, and answers by when they were given."""

SHOWN = 240  # characters of a text on the terminal
LABELS = {"instruction": "prompt", "reference": "reference"}


def choose(samples: Iterable[Sample], number: int) -> list[Sample]:
    """Choose a few, the same ones whenever the same prompts are answered, and no others for their length or place.

    >>> samples = [{"prompt": f"What is 1 plus {i}?"} for i in range(9)]
    >>> choose(samples, 2) == choose(samples[::-1], 2)
    True
    """
    unique = {sample["prompt"]: sample for sample in samples}
    return sorted(unique.values(), key=lambda sample: (zlib.crc32(sample["prompt"].encode()), sample["prompt"]))[
        :number
    ]


def shorten(text: str, length: int = SHOWN) -> str:
    r"""Write a text on one line that a terminal shows as it is, the end left out where it is long.

    >>> shorten("one\n two"), shorten("one two three", 8), shorten(" ")
    ('one two', 'one two…', '(nothing)')
    """
    text = printable(" ".join(text.split()))
    return (text if len(text) <= length else text[: length - 1] + "…") or "(nothing)"


def table(samples: Sequence[Sample], answers: Sequence[str], title: str) -> RenderableType:
    """Show prompts, references and answers one below the other.

    Args:
        samples: At least one.
        answers: Which answers, by their keys, such as ``"before"`` and ``"after"``.
        title: Above all.
    """
    grid = Table(show_header=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for sample in samples:
        labels = {**LABELS, **{answer: answer for answer in answers if answer in sample}}
        for key, label in labels.items():
            # As Text, because brackets in it are not markup.
            grid.add_row(label, Text(shorten(sample[key]), style="bold" if key == answers[-1] else ""))
        grid.add_section()
    return Group(Text(title, style="bold"), grid)  # a title of the table's own would be as narrow


def log_samples(logger: Logger, samples: Sequence[Sample], step: int, stage: str) -> None:
    """Give samples to a logger: as a table where it has such, else as text, or as ``samples.jsonl`` beside its files.

    Args:
        logger: Any of Lightning's; one that takes neither is left alone.
        samples: With the keys ``instruction``, ``reference`` and ``answer``.
        step: That of the metrics which are logged beside them.
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
        path = Path(logger.log_dir) / "samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for row in rows:
                record: Mapping[str, Any] = {"step": step, "stage": stage, **dict(zip(columns, row, strict=True))}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
