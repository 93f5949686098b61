"""Compares what ``preview`` estimates with the peak of memory that ``fit`` reaches on this machine's CPU.

python benchmarks/memory.py        # about six minutes; publishes a table
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import publish, table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

COMMON = [
    *("--config", "milora.yaml", "--config", "{folder}/data.yaml", "--data.num_generation_examples=0"),
    "--data.global_batch_size=null",
    *("--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"),
    *("--trainer.callbacks=[]", "--trainer.enable_checkpointing=false", "--logger=none", "--model.dtype=float32"),
]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "wide": LlamaConfig(
        **SPECIAL,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=4096,
    ),
    "words": Qwen2Config(
        **SPECIAL,
        hidden_size=448,
        intermediate_size=1216,
        num_hidden_layers=6,
        num_attention_heads=7,
        num_key_value_heads=7,
        vocab_size=128000,
        tie_word_embeddings=True,
    ),
    "deep": Qwen3Config(
        **SPECIAL,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=32,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=64,
        vocab_size=4096,
    ),
}
SETTINGS = {
    "long rows, few words: Llama of 4 layers of 768, sdpa, 1 x 1536": [
        *("--model.name_or_path={folder}/wide", "--model.attn_implementation=sdpa"),
        *("--data.batch_size=1", "--data.max_length=1536"),
    ],
    "many words, short rows: Qwen2 of 6 layers of 448, 128000 words, eager, 24 x 48": [
        *("--model.name_or_path={folder}/words", "--model.attn_implementation=eager"),
        *("--data.batch_size=24", "--data.max_length=48"),
    ],
    "deep, checkpoints: Qwen3 of 32 layers of 320, sdpa, all layers adapted, 3 x 320": [
        *("--model.name_or_path={folder}/deep", "--model.attn_implementation=sdpa", "--data.batch_size=3"),
        *("--model.gradient_checkpointing=true", "--adapter.target_modules=all-linear", "--data.max_length=320"),
    ],
    # Not used to derive anything.
    "wide, checkpoints: Llama of 4 layers of 768, causal_blocks, 3 x 768": [
        *("--model.name_or_path={folder}/wide", "--model.attn_implementation=causal_blocks", "--data.batch_size=3"),
        *("--model.gradient_checkpointing=true", "--data.max_length=768"),
    ],
    "deep, without checkpoints: Qwen3 of 32 layers of 320, causal_blocks, 2 x 192": [
        *("--model.name_or_path={folder}/deep", "--model.attn_implementation=causal_blocks", "--data.batch_size=2"),
        "--data.max_length=192",
    ],
}
PROGRAM = """
import sys
from milora_lightning.__main__ import main
from milora_lightning.utils.process_memory import peak_resident
try:
    main()
finally:
    print(f"\\npeak: {peak_resident()}")
"""
# Examples of one length, so that every batch is as large as the largest.
DATA = """
data:
  template: plain
  source: {class_path: milora_lightning.data.Files, init_args: {train: FOLDER/train.jsonl, validation_size: 0}}
"""


def main() -> None:
    """Publish the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name, settings in SETTINGS.items():
            estimated, measured = compare(folder, settings)
            error = f"{estimated / measured - 1:+.0%}"
            rows.append([name, f"{estimated:.2f} GB", f"{measured:.2f} GB", error])
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    text = table(["model and settings", "estimated", "measured", "error"], rows)
    publish("memory", f"{text}\n\nTwo steps in float32.")


def prepare(folder: Path) -> None:
    """Write the models, from their configurations, and the data."""
    for name, config in MODELS.items():
        AutoModelForCausalLM.from_config(config, dtype="float32").save_pretrained(folder / name)
        tokenizer_of_bytes().save_pretrained(folder / name)
    row = json.dumps({"prompt": "Count.", "response": " ".join(map(str, range(3000)))})
    (folder / "train.jsonl").write_text(f"{row}\n" * 48)
    (folder / "data.yaml").write_text(DATA.replace("FOLDER", str(folder)))


def tokenizer_of_bytes() -> Any:
    """Make a tokenizer for any vocabulary of 259 words or more."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def compare(folder: str, settings: list[str]) -> tuple[float, float]:
    """Return what preview estimates of a run and the peak of fit, in GB."""
    options = [option.format(folder=folder) for option in [*COMMON, *settings]]
    texts = []
    for command in ("preview", "fit"):  # both in a process of their own, as users run them
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, command, *options], capture_output=True, text=True, cwd=folder, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command} has failed:\n{done.stderr}")
        texts.append(done.stdout)
    (estimated,) = re.findall(r"estimated: ([\d.]+) GB", texts[0])
    (measured,) = re.findall(r"^peak: (\d+)$", texts[1], re.MULTILINE)
    return float(estimated), int(measured) / 1e9


if __name__ == "__main__":
    main()
