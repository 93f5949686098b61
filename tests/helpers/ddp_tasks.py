"""What the processes of test_distributed.py run for tasks: test on several sets, then predict."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.models import quiet_trainer
from helpers.tasks import Parrot, commonsense, datamodule
from milora_lightning import PredictionWriter


def tasks(folder: Path, devices: int, batch_size: int) -> None:
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    writer = PredictionWriter(str(folder / f"tasks-{devices}.jsonl"), alpaca_eval=str(folder / f"tasks-{devices}.json"))
    trainer = quiet_trainer(folder, callbacks=[writer], **options)
    lm = Parrot(str(folder / "model"))
    results = []
    for answer_by in ("generation", "likelihood"):
        source = commonsense(folder / f"tasks-{devices}-{trainer.global_rank}")
        data = datamodule(source, folder / "model", generation_batch_size=batch_size, answer_by=answer_by)
        trainer.test(lm, data, verbose=False)
        results.append({key: value.item() for key, value in trainer.callback_metrics.items()})
    trainer.predict(lm, data)
    torch.save(results, folder / f"tasks-{devices}-{trainer.global_rank}.pt")
