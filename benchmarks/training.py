"""Training throughput and peak memory on real word problems, against PEFT with the Hugging Face Trainer.

The embedded model, GSM8K's training problems (a JSON lines file, the first argument) with Alpaca prompts, batch 16,
r = 32 on the paper's five target modules, dropout 0, AdamW. Each run is a process of its own; its first step, a
warm-up, is not counted. The examples are the same, in each trainer's own order and batches.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import machine, table
from lightning.pytorch import Callback, Trainer

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule
from milora_lightning.data import Files, tokenize_dataset
from milora_lightning.pretrained import load_causal_lm, load_tokenizer

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
BATCH, STEPS, ROUNDS = 16, 4, 3


class Clock(Callback):
    """Notes when steps end, and how many tokens are in them."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note one."""
        self.ends.append(time.perf_counter())
        self.tokens.append(int(batch["attention_mask"].sum()))


def ours(source: Files, dtype: str) -> Clock:
    clock = Clock()
    attention = "causal_blocks"
    lm = CausalLMModule("embedded", dtype=dtype, attn_implementation=attention, warmup_steps=0)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    callbacks = [MiLoRAInit(r=32, target_modules=TARGETS), clock]
    trainer = Trainer(max_steps=STEPS, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(lm, SFTDataModule(source, "embedded", template="alpaca", batch_size=BATCH))
    return clock


def peft(source: Files, dtype: str) -> Clock:
    import transformers
    from peft import LoraConfig, get_peft_model

    clock = Clock()
    tokenizer = load_tokenizer("embedded")
    examples = tokenize_dataset(source.load("train"), tokenizer, template="alpaca")  # type: ignore[arg-type]
    rows = [
        {"input_ids": ids, "labels": [-100] * start + ids[start:]}
        for ids, start in zip(examples["input_ids"][:], examples["prompt_length"][:], strict=True)
    ]
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)

    def collate(batch: list[dict[str, Any]]) -> Any:
        collated = collator(batch)
        clock.tokens.append(int(collated["attention_mask"].sum()))
        return collated

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.ends.append(time.perf_counter())

    config = LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=3e-4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = get_peft_model(load_causal_lm("embedded", dtype), config)
    transformers.Trainer(model, arguments, collate, rows, callbacks=[Ends()]).train()
    return clock


def measure(contender: str, file: str, dtype: str) -> None:
    torch.manual_seed(0)
    source = Files(train=file, prompt_field="question", response_field="answer")
    clock = {"ours": ours, "peft": peft}[contender](source, dtype)
    rate = sum(clock.tokens[1:STEPS]) / (clock.ends[STEPS - 1] - clock.ends[0])
    print(json.dumps({"rate": rate, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def main(file: str) -> None:
    rows = []
    for dtype in ("bfloat16", "float32"):
        found: dict[str, list[dict[str, float]]] = {"ours": [], "peft": []}
        for number in range(ROUNDS):
            for contender, results in found.items():
                command = [sys.executable, __file__, file, contender, dtype]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {number + 1}, {dtype}, {contender}: {results[-1]}", file=sys.stderr, flush=True)
        median = {
            (who, key): statistics.median(r[key] for r in results)
            for who, results in found.items()
            for key in ("rate", "memory")
        }
        rates = [f"{median[who, 'rate']:.0f}" for who in ("ours", "peft")]
        memory = [f"{median[who, 'memory']:.1f} GB" for who in ("ours", "peft")]
        ratio = f"{median['ours', 'rate'] / median['peft', 'rate']:.1f}×"
        rows.append([dtype, rates[0], rates[1], ratio, memory[0], memory[1]])
    columns = ["base", "tokens/s", "PEFT's tokens/s", "faster", "peak memory", "PEFT's"]
    note = (
        f"Tokens without padding; {STEPS - 1} steps of {BATCH} problems after one of warm-up, medians of {ROUNDS} "
        f"alternating rounds; PEFT {version('peft')}, transformers {version('transformers')}; nothing is compiled."
    )
    print(f"{table(columns, rows)}\n\n{note}\n\n({machine()})")


if __name__ == "__main__":
    if not (len(sys.argv) > 1 and Path(sys.argv[1]).is_file()):
        sys.exit("Give the JSON lines file of GSM8K's training problems, with the fields question and answer.")
    measure(sys.argv[2], sys.argv[1], sys.argv[3]) if len(sys.argv) > 2 else main(sys.argv[1])
