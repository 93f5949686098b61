"""What the processes of test_distributed.py run."""

import sys
from pathlib import Path

import torch
from conftest import quiet_trainer
from test_module import data, module
from lightning.pytorch.strategies import ModelParallelStrategy
from milora_lightning import MiLoRAInit
from milora_lightning.sharding import full_tensor

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=len(sys.argv) > 2)
    trainer = quiet_trainer(folder, max_steps=10, max_epochs=9, strategy=strategy, devices=2, callbacks=[MiLoRAInit(r=4, seed=5)])
    torch.manual_seed(100 + trainer.global_rank)
    lm = module(folder / "model")
    trainer.fit(lm, data(folder, folder / "model", batch_size=2))
    trainer.save_checkpoint(folder / "saved.ckpt")
    results = trainer.validate(lm, data(folder, folder / "model", eval_batch_size=3), verbose=False)
    print(results)
    state = {k: full_tensor(v) for k, v in lm.state_dict().items() if isinstance(v, torch.Tensor)}
    print(trainer.global_rank, sum(v.sum() for v in state.values()))
