"""Compares what ``preview`` estimates with the peak of memory that ``fit`` reaches on this machine's CPU.

python benchmarks/memory.py        # about ten minutes; prints a table in Markdown
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, Qwen3Config

from milora_lightning.pretrained import load_tokenizer

MAIN = str(Path(__file__).parent.parent / "main.py")
COMMON = [
    *("--config", "milora.yaml", "--config", "{folder}/data.yaml", "--data.num_generation_examples=0"),
    *("--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"),
    *("--trainer.callbacks=[]", "--trainer.enable_checkpointing=false", "--logger=none"),
]
SETTINGS = {
    "SmolLM2-135M, float32, causal_blocks, 4 x 256": ["--model.dtype=float32", "--data.batch_size=4"],
    "SmolLM2-135M, float32, sdpa, checkpointing, 8 x 256": [
        *("--model.dtype=float32", "--model.attn_implementation=sdpa", "--model.gradient_checkpointing=true"),
        *("--data.batch_size=8",),
    ],
    "Qwen3 of 8 layers of 512, float32, sdpa, all layers, 16 x 256": [
        *(
            "--model.name_or_path={folder}",
            "--model.dtype=float32",
            "--model.attn_implementation=sdpa",
            "--adapter.target_modules=all-linear",
        ),
        *("--data.batch_size=16",),
    ],
}
# Examples of one length, so that every batch is as large as the largest.
DATA = """
data:
  source: {class_path: milora_lightning.data.Files, init_args: {train: FOLDER/train.jsonl, validation_size: 0}}
  max_length: 256
"""


def main() -> None:
    """Print the table."""
    print("| model and settings | estimated | measured | error |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        row = json.dumps({"prompt": "Count.", "response": " ".join(map(str, range(1000)))})
        Path(folder, "train.jsonl").write_text(f"{row}\n" * 64)
        Path(folder, "data.yaml").write_text(DATA.replace("FOLDER", folder))
        for name, settings in SETTINGS.items():
            options = [option.format(folder=folder) for option in [*COMMON, *settings]]
            text = subprocess.run(
                [sys.executable, MAIN, "preview", *options], check=True, capture_output=True, text=True
            ).stdout
            estimated = float(re.findall(r"estimated: ([\d.]+) GB", text)[0])
            measured = peak([sys.executable, MAIN, "fit", *options])
            print(f"| {name} | {estimated:.2f} GB | {measured:.2f} GB | {estimated / measured - 1:+.0%} |", flush=True)


def save_model(folder: str) -> None:
    tokenizer = load_tokenizer("embedded")
    config = Qwen3Config(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=len(tokenizer),
    )
    AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def peak(command: list[str]) -> float:
    """Run a command and return the most memory that it had, in GB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} has failed.")
    return usage.ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
