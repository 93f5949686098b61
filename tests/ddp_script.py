"""What the processes of test_distributed.py run: train, then save what each rank ended with."""

import sys
from pathlib import Path

import torch
from conftest import quiet_trainer
from test_module import data, module

from milora_lightning import MiLoRAInit

if __name__ == "__main__":
    folder, init, devices, batch_size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    trainer = quiet_trainer(
        folder, max_steps=10, max_epochs=9, **options, callbacks=[MiLoRAInit(r=4, init=init, seed=5)]
    )
    torch.manual_seed(100 + trainer.global_rank)  # deliberately different
    lm = module(folder / "model")
    trainer.fit(lm, data(folder, folder / "model", batch_size=batch_size))
    results = trainer.validate(lm, data(folder, folder / "model", eval_batch_size=3), verbose=False)
    torch.save(
        {
            "state": {k: v for k, v in lm.state_dict().items() if isinstance(v, torch.Tensor)},
            "results": results,
        },
        folder / f"{init}-{devices}-{trainer.global_rank}.pt",
    )
