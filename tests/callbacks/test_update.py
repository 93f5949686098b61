"""The monitor of updates logs what the analysis of the same layers and batches finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layers import relative_effects
from helpers.models import quiet_trainer, save_tiny_model
from helpers.modules import data, module
from torch import Tensor

from milora_lightning import MiLoRAInit, UpdateMonitor, lora_layers


def test_monitor_logs_size_and_effect_of_the_first_batches(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "llama", "llama")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[MiLoRAInit(r=4), UpdateMonitor(batches=2)])
    lm = module(model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    examples = data(tmp_path, model)
    at_start = trainer.validate(lm, examples, verbose=False)[0]
    assert (at_start["update_size"], at_start["update_effect"]) == (0, 0)
    trainer.fit(lm, examples)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    layers = lora_layers(lm)
    sizes = [layer.delta_weight().norm() / layer.base_layer.weight.norm() for layer in layers.values()]
    assert logged["update_size"] == pytest.approx(torch.stack(sizes).mean().item(), rel=1e-5)

    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
        for name, layer in layers.items()
    ]
    batches = [batch for batch, _ in zip(examples.val_dataloader()[0], range(2), strict=False)]
    lm.eval()
    with torch.no_grad():
        for batch in batches:
            lm.model(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    masks = torch.cat([batch["attention_mask"].flatten() for batch in batches]).bool()
    assert not masks.all()
    effects = [
        relative_effects(layer, torch.cat([x.flatten(0, 1) for x in inputs[name]]))[masks].mean()
        for name, layer in layers.items()
    ]
    assert logged["update_effect"] == pytest.approx(torch.stack(effects).mean().item(), rel=1e-4)


def test_monitor_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="batches must be at least 0"):
        UpdateMonitor(-1)
