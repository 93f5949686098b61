"""What the processes of test_forgetting.py run: measure, with factors moved by hand, and print the result."""

import sys
from pathlib import Path

import torch
from conftest import quiet_trainer
from test_module import data, module

from milora_lightning import ForgettingMonitor, MiLoRAInit, lora_layers

if __name__ == "__main__":
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    monitor = ForgettingMonitor(str(folder / "text.txt"), block_length=16, max_tokens=16 * 7, batch_size=2)
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    callbacks = [MiLoRAInit(r=4, seed=5), monitor]
    trainer = quiet_trainer(folder, max_steps=1, num_sanity_val_steps=0, callbacks=callbacks, **options)
    lm = module(folder / "llama")
    trainer.fit(lm, data(folder, folder / "llama", num_generation_examples=0))
    for name, layer in lora_layers(lm).items():
        layer.lora_B.data += 0.05 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(len(name)))
        layer.lora_A.data.copy_(layer.initial_A)
    results = monitor.measure(trainer, lm)
    print("RESULT", results["forgetting_kl"], results["forgetting_cross_entropy"])
