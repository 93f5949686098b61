"""Writes generated answers to a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from milora_lightning.strategies.base import DataRank, data_rank
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import check_file


class PredictionWriter(BasePredictionWriter):
    """Writes prompt, instruction, generation, reference and task of every predicted example as JSON lines.

    Lines are written batch by batch, so an interrupted run leaves the answers generated so far. With several processes,
    each one writes a separate file for its share of the data, with the number of the share before the suffix.

    Args:
        output: The file to write. Its folder is created if necessary; an existing file is replaced.
        alpaca_eval: A JSON file that is also written at the end, in the format that ``alpaca_eval --model_outputs``
            reads: the generations of all processes in the order of the data.
        generator: The name of the model in ``alpaca_eval``.
        follow_bench: A folder that is also written at the end, with a file for each type of constraint, as
            FollowBench's evaluation expects in ``api_output_vllm/MODEL``. Requires the source
            :class:`milora_lightning.data.FollowBench`.
    """

    def __init__(
        self,
        output: str = "predictions.jsonl",
        alpaca_eval: str | None = None,
        generator: str = "milora",
        follow_bench: str | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        self.output = Path(output)
        self.alpaca_eval = Path(alpaca_eval) if alpaca_eval is not None else None
        self.generator = generator
        self.follow_bench = Path(follow_bench) if follow_bench is not None else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse files that cannot be written, before a model is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            for path in (self._file(data_rank(trainer)), self.alpaca_eval):
                if path is not None:
                    check_file(path, "Predictions")
            if self.follow_bench is not None:
                check_file(self.follow_bench / "content_constraint.jsonl", "Predictions")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create empty files, so that a place that cannot be written to is found before any work.

        Raises:
            ValueError: If a file cannot be written.
        """
        share = data_rank(trainer)
        for path in (self._file(share), self.alpaca_eval):
            if path is None or not share.first:
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("", encoding="utf-8")
            except OSError as error:
                raise InvalidInputError(
                    f"Predictions cannot be written to {path} ({error.strerror}): choose another file."
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
        share = data_rank(trainer)
        if not share.first:
            return
        with self._file(share).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the generations for ``alpaca_eval`` and ``follow_bench``, and report the files' locations."""
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        size = data_rank(trainer).size
        files = [self._file(DataRank(number, size, first=True)) for number in range(size)]
        if self.alpaca_eval is not None:
            records = [alpaca_eval_record(record, self.generator) for record in _interleaved(files)]
            self.alpaca_eval.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
        if self.follow_bench is not None:
            self._write_follow_bench(_interleaved(files))
        print("Predictions written to", *files, *filter(None, (self.alpaca_eval, self.follow_bench)))

    def _write_follow_bench(self, records: Iterator[dict[str, str]]) -> None:
        assert self.follow_bench is not None
        lines: dict[str, list[str]] = {}
        for record in records:
            line = json.dumps(follow_bench_record(record), ensure_ascii=False)
            lines.setdefault(record["task"] or "content", []).append(line + "\n")
        self.follow_bench.mkdir(parents=True, exist_ok=True)
        for task, written in lines.items():
            path = self.follow_bench / f"{task}_constraint.jsonl"
            path.write_text("".join(written), encoding="utf-8")

    def _file(self, share: DataRank) -> Path:
        return self.output if share.size == 1 else self.output.with_suffix(f".{share.number}{self.output.suffix}")


def alpaca_eval_record(record: dict[str, str], generator: str) -> dict[str, str]:
    """Convert a prediction to the format that AlpacaEval scores.

    >>> alpaca_eval_record({"instruction": "Hi", "generation": "Hello!", "task": "koala", "prompt": "Hi"}, "mine")
    {'dataset': 'koala', 'instruction': 'Hi', 'output': 'Hello!', 'generator': 'mine'}
    """
    return {
        "dataset": record["task"],
        "instruction": record["instruction"],
        "output": record["generation"],
        "generator": generator,
    }


def follow_bench_record(record: dict[str, str]) -> dict[str, Any]:
    """Convert a prediction to a line that FollowBench's evaluation reads.

    >>> follow_bench_record({"instruction": "Hi", "generation": "Hello!", "task": "style", "prompt": "Hi"})
    {'prompt': 'Hi', 'choices': [{'message': {'content': 'Hello!'}}]}
    """
    return {"prompt": record["instruction"], "choices": [{"message": {"content": record["generation"]}}]}


def _interleaved(files: list[Path]) -> Iterator[dict[str, str]]:
    """Read records in the order of the data; rank k of N has every N-th record, starting with the k-th."""
    with ExitStack() as stack:
        for lines in zip_longest(*(stack.enter_context(path.open(encoding="utf-8")) for path in files)):
            yield from (json.loads(line) for line in lines if line is not None)
