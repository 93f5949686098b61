"""Writing what the model generates to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes prompt, generation and reference of every predicted example as JSON lines.

    Lines are written batch by batch, so that an interrupted run leaves what it has done. With several processes
    each writes its own file, the rank before the suffix.

    Args:
        output: The file to write; its folder is made, an existing file is replaced.
    """

    def __init__(self, output: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.output = Path(output)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an empty file, so that an unwritable place is noticed before any work."""
        self._file(trainer).parent.mkdir(parents=True, exist_ok=True)
        self._file(trainer).write_text("", encoding="utf-8")

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
        with self._file(trainer).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the predictions are."""
        if trainer.is_global_zero:
            print(f"Predictions written to {self._file(trainer)}")

    def _file(self, trainer: Trainer) -> Path:
        if trainer.world_size == 1:
            return self.output
        return self.output.with_suffix(f".{trainer.global_rank}{self.output.suffix}")
