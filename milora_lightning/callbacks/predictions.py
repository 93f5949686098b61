"""Writing what the model generates to a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from milora_lightning.utils.errors import InvalidInputError


class PredictionWriter(BasePredictionWriter):
    """Writes prompt, instruction, generation, reference and task of every predicted example as JSON lines.

    Lines are written batch by batch, so that an interrupted run leaves what it has done. With several processes
    each writes its own file, the rank before the suffix.

    Args:
        output: The file to write; its folder is made, an existing file is replaced.
        alpaca_eval: A JSON file to write besides when all is done, in the format that ``alpaca_eval --model_outputs``
            reads: all processes' generations in the order of the data.
        generator: What ``alpaca_eval`` is to call the model.
    """

    def __init__(
        self, output: str = "predictions.jsonl", alpaca_eval: str | None = None, generator: str = "milora"
    ) -> None:
        super().__init__(write_interval="batch")
        self.output = Path(output)
        self.alpaca_eval = Path(alpaca_eval) if alpaca_eval is not None else None
        self.generator = generator

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin empty files, so that an unwritable place is noticed before any work.

        Raises:
            ValueError: If it is that.
        """
        for path in (self._file(trainer.global_rank, trainer.world_size), self.alpaca_eval):
            if path is None:
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("", encoding="utf-8")
            except OSError as error:
                raise InvalidInputError(
                    f"Predictions cannot be written to {path} ({error.strerror}): name a file in another place."
                ) from error

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the records of one batch."""
        with self._file(trainer.global_rank, trainer.world_size).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the generations for ``alpaca_eval``, and say where they are."""
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        files = [self._file(rank, trainer.world_size) for rank in range(trainer.world_size)]
        if self.alpaca_eval is not None:
            records = [alpaca_eval_record(record, self.generator) for record in _interleaved(files)]
            self.alpaca_eval.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
        print("Predictions written to", *files, *([self.alpaca_eval] if self.alpaca_eval else []))

    def _file(self, rank: int, world_size: int) -> Path:
        return self.output if world_size == 1 else self.output.with_suffix(f".{rank}{self.output.suffix}")


def alpaca_eval_record(record: dict[str, str], generator: str) -> dict[str, str]:
    """Bring a prediction into the format that AlpacaEval scores.

    >>> alpaca_eval_record({"instruction": "Hi", "generation": "Hello!", "task": "koala", "prompt": "Hi"}, "mine")
    {'dataset': 'koala', 'instruction': 'Hi', 'output': 'Hello!', 'generator': 'mine'}
    """
    return {
        "dataset": record["task"],
        "instruction": record["instruction"],
        "output": record["generation"],
        "generator": generator,
    }


def _interleaved(files: list[Path]) -> Iterator[dict[str, str]]:
    """Read records in the order of the data, of which rank k has every N-th from the k-th on."""
    with ExitStack() as stack:
        for lines in zip_longest(*(stack.enter_context(path.open(encoding="utf-8")) for path in files)):
            yield from (json.loads(line) for line in lines if line is not None)
