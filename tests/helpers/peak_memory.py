"""What test_memory.py runs in a process of its own: peaks of memory, as estimated and as measured.

Each run has a fork of this process, whose imports are what takes long: as separate programs they would all need them.

    python peak_memory.py FOLDER
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.models.loss import causal_lm_loss
from milora_lightning.models.memory import LOADED, estimate, planned_model
from milora_lightning.utils.process_memory import peak_resident, resident


def own_loop() -> tuple[int, int | None]:
    """Train two steps; return the peaks in bytes, as estimated before and as measured."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=8000, pad_token_id=0)
    adapters = LoRAConfig(16, lora_dropout=0.1)
    plan = planned_model(config, torch.float32, adapters)
    expected = estimate(plan, config, 8, 256, dropout=0.1)
    before = (resident() or 0) + LOADED
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    inject(model, adapters)
    initialize(model)
    model.train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        ids = torch.randint(1, 8000, (8, 256))
        optimizer.zero_grad()
        causal_lm_loss(model, ids, ids).backward()
        optimizer.step()
    return before + expected.peak, peak_resident()


def command(folder: str, checkpointing: bool) -> tuple[str, int | None]:
    """Preview and train two steps with the model and the examples in a folder; return the preview, and the peak."""
    from milora_lightning.cli.commands.preview import preview
    from milora_lightning.cli.main import main

    options = ["--config=milora.yaml", f"--model.name_or_path={folder}", "--model.dtype=float32"]
    options += ["--model.attn_implementation=sdpa", f"--model.gradient_checkpointing={str(checkpointing).lower()}"]
    options += [
        "--data.source=Files",
        f"--data.source.train={folder}/examples.jsonl",
        "--data.source.validation_size=0",
    ]
    options += ["--data.template=plain", "--data.max_length=1024", "--data.global_batch_size=2"]
    options += ["--data.num_generation_examples=0", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    options += ["--trainer.num_sanity_val_steps=0", "--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"]
    options += ["--trainer.logger=false", f"--trainer.default_root_dir={folder}"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        preview(options, examples=0)
    with contextlib.redirect_stdout(io.StringIO()):
        main(["fit", *options])
    return text.getvalue(), peak_resident()


def in_a_fork(path: Path, run: Callable[[], object]) -> None:
    """Write what a run returns to a file, as JSON."""
    child = os.fork()
    if not child:
        path.write_text(json.dumps(run()))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, path.name


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    in_a_fork(folder / "loop.json", own_loop)
    importlib.import_module("milora_lightning.cli.main")  # not before: the loop has what the method needs, and no more
    for checkpointing in (False, True):
        in_a_fork(folder / f"command-{checkpointing}.json", lambda on=checkpointing: command(str(folder), on))
