"""The two steps of the method as functions, in a training loop of your own.

python examples/without_lightning.py
"""

import torch
from torch import nn

from milora_lightning import LoRAConfig, adapters_disabled, initialize, inject

if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    x = torch.randn(32, 16)
    before = model(x)

    inject(model, LoRAConfig(r=4))  # freezes the model, and puts an adapter around each linear layer
    initialize(model)  # starts the factors at the smallest singular triplets of the weights
    assert torch.equal(model(x), before)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")

    with adapters_disabled(model):
        assert torch.equal(model(x), before)  # the pretrained model, bit for bit
