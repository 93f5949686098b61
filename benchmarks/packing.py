"""Compares rows that are padded, packed, or all in one, in runs of the command line on one thread of this CPU.

Seconds are those of the processor, so that other programs on the machine count little.

python benchmarks/packing.py            # a small random model, two minutes; publishes a table in docs/conversations.md
python benchmarks/packing.py embedded   # the embedded model instead, fifteen minutes
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import publish, table
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM, LlamaConfig

from milora_lightning.cli.main import main as milora
from milora_lightning.models.pretrained import load_tokenizer

STEPS, ROUNDS, LENGTH, ROWS = 4, 2, 512, 8
LAYOUTS: dict[str, list[str]] = {
    f"padded, `batch_size: {ROWS}`": [f"--data.batch_size={ROWS}"],
    "padded, `max_tokens_per_batch: 1024`": ["--data.max_tokens_per_batch=1024"],
    f"packed, rows of {LENGTH}, `batch_size: 2`": ["--data.packing=true", "--data.batch_size=2"],
    "one row, `max_tokens_per_batch: 1024`": ["--data.padding_free=true", "--data.max_tokens_per_batch=1024"],
}


class Clock(Callback):
    """Counts tokens, padding and seconds of the steps after the first."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count a batch, from the second on."""
        if batch_idx == 1:
            self.tokens = self.padded = 0
            self.started = time.process_time()
        if batch_idx > 0:
            self.tokens += int(batch["lengths" if "lengths" in batch else "attention_mask"].sum())
            self.padded += batch["input_ids"].numel()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.seconds = time.process_time() - getattr(self, "started", 0.0)


def write_rows(path: Path) -> None:
    """Write rows of short and mixed lengths, as chat data have them: about 15 to 500 tokens, most of them short."""
    generator = random.Random(0)
    lines = []
    for _ in range(600):
        words = min(330, max(8, round(generator.lognormvariate(4.2, 0.8))))
        text = " ".join(generator.choice(["one", "two", "red", "house", "walk", "tree"]) for _ in range(words))
        lines.append(json.dumps({"prompt": text, "response": text[: len(text) // 2]}))
    path.write_text("\n".join(lines) + "\n")


def run(folder: Path, model: str, layout: list[str]) -> tuple[float, float]:
    """Train for a few steps; return tokens per second, without padding, and the share of padding."""
    options = [f"--model.name_or_path={model}", "--model.dtype=float32", f"--data.source.train={folder / 'rows.jsonl'}"]
    options += ["--data.template=plain", f"--data.max_length={LENGTH}", "--data.num_generation_examples=0"]
    options += [f"--trainer.max_steps={STEPS}", "--trainer.limit_val_batches=0", "--logger=none", "--adapter.r=32"]
    options += ["--trainer.enable_checkpointing=false", "--trainer.callbacks=packing.Clock", "--seed_everything=0"]
    options += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}"]
    cli = milora(["fit", *options, *layout])
    clock = next(c for c in cli.trainer.callbacks if type(c).__name__ == "Clock")
    return clock.tokens / clock.seconds, 1 - clock.tokens / clock.padded


def main() -> None:
    """Run the layouts in turn, round after round."""
    torch.set_num_threads(1)
    embedded = sys.argv[1:] == ["embedded"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl")
        model = "embedded"
        if not embedded:
            model = str(folder / "model")
            tokenizer = load_tokenizer("embedded")
            tokenizer.save_pretrained(model)
            torch.manual_seed(0)
            config = LlamaConfig(
                hidden_size=256,
                intermediate_size=768,
                num_hidden_layers=4,
                num_attention_heads=4,
                vocab_size=len(tokenizer),
            )
            AutoModelForCausalLM.from_config(config).save_pretrained(model)
        rates: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
        padding = {}
        for _ in range(ROUNDS):
            for layout, options in LAYOUTS.items():
                rate, padding[layout] = run(folder, model, options)
                rates[layout].append(rate)
    first, *_ = rates.values()
    rows = []
    for layout, values in rates.items():
        ratio = statistics.median(value / padded for value, padded in zip(values, first, strict=True))
        rows.append([layout, f"{statistics.median(values):.0f}", f"{ratio:.2f}×", f"{padding[layout]:.1%}"])
    text = table(["batches", "tokens/s", "of the first row's", "padding"], rows)
    what = "the embedded model" if embedded else "a random Llama of 4 layers, 256 features and the embedded vocabulary"
    note = (
        f"{what[0].upper()}{what[1:]} in float32, rows of 15 to 500 tokens. Tokens without padding in a second of the "
        f"processor, on one thread; {STEPS - 1} steps, medians of {ROUNDS} rounds in turn."
    )
    publish("packing", f"{text}\n\n{note}")


if __name__ == "__main__":
    main()
