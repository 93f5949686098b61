"""What the screen says of an evaluation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from helpers.models import tiny_model
from torch import nn

from milora_lightning.callbacks.progress import RunProgress


def test_tokens_of_an_answer_are_counted_and_passes_of_monitors_after_it_are_not() -> None:
    module: Any = nn.ModuleDict({"model": tiny_model("llama")})
    trainer: Any = SimpleNamespace(sanity_checking=False, num_val_batches=[2])
    ids = torch.tensor([[5, 6, 7]])
    progress = RunProgress()
    progress.disable()
    progress.on_validation_start(trainer, module)
    work = progress.state.work
    assert work is not None
    notes = []
    for number, batch in enumerate(({"input_ids": ids}, {"input_ids": ids, "reference": ["a", "b"]})):
        progress.on_validation_batch_start(trainer, module, batch, number)
        for _ in range(3):
            module["model"](ids)
        notes.append(work.note)
        progress.on_validation_batch_end(trainer, module, None, batch, number)
        module["model"](ids)
        notes.append(work.note)
    assert notes == ["", "", "answering 2 prompts at token 3", ""]
    assert work.done == 2
