"""What the processes of test_distributed.py run for tasks: test on several sets, then predict."""

import helpers.environment  # noqa: F401, I001 (first)
import sys
from pathlib import Path

import torch
from helpers.models import quiet_trainer
from helpers.tasks import Parrot, commonsense, datamodule

from milora_lightning import PredictionWriter

if __name__ == "__main__":
    folder, what, devices, batch_size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    name = f"{what}-{devices}"
    writer = PredictionWriter(str(folder / f"{name}.jsonl"), alpaca_eval=str(folder / f"{name}.json"))
    trainer = quiet_trainer(folder, callbacks=[writer], **options)
    lm = Parrot(str(folder / "model"))
    results = []
    for answer_by in ("generation", "likelihood"):
        source = commonsense(folder / f"{name}-{trainer.global_rank}")
        data = datamodule(source, folder / "model", generation_batch_size=batch_size, answer_by=answer_by)
        trainer.test(lm, data, verbose=False)
        results.append({key: value.item() for key, value in trainer.callback_metrics.items()})
    trainer.predict(lm, data)
    torch.save(results, folder / f"{name}-{trainer.global_rank}.pt")
