"""Training on one GPU, against PEFT with the Hugging Face Trainer, and TRL with and without Liger's kernels.

A Llama of 1.1 billion random bfloat16 weights (speed does not depend on their values; a first argument names another
model), examples of random words with the lengths of MetaMathQA's, batches of 16, r = 32 on the paper's five target
modules, dropout 0.05, AdamW, loss on the answers. Each run is a process of its own, whose first steps, a warm-up, are
not counted. The examples are the same, in each trainer's own order and batches. Ten minutes on an H100, without a
download. `--tiny` tries the script with a tiny model, on the CPU too.

    make gpu
    python benchmarks/gpu.py [MODEL] [--tiny]

It prints a table and writes it to benchmarks/results/gpu.md.
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import ROOT, publish, table
from datasets import Dataset
from lightning.pytorch import Trainer
from training import TARGETS, Clock, count, peft_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule
from milora_lightning.data import Files, tokenize_dataset
from milora_lightning.models.pretrained import load_causal_lm, load_tokenizer

RESULTS = ROOT / "benchmarks" / "results" / "gpu.md"
BATCH, DROPOUT, ROUNDS = 16, 0.05, 2
BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
ON_GPU = torch.cuda.is_available()


class DeviceClock(Clock):
    """A clock that waits for the device before the counted steps and after them, and not in between."""

    def __init__(self, waits: tuple[int, int]) -> None:
        super().__init__()
        self.waits = waits

    def note(self) -> None:
        """Note the end of a step, which its operations have reached if it is counted from or to."""
        if ON_GPU and len(self.ends) + 1 in self.waits:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note one; the batch's tokens are on the device, and are counted at the end."""
        self.note()
        self.tokens.append(batch["attention_mask"].sum())


def ours(clock: DeviceClock, steps: int, model: str, file: Path, **options: Any) -> float:
    lm = CausalLMModule(model, "bfloat16", warmup_steps=0, **options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    callbacks = [MiLoRAInit(r=32, target_modules=TARGETS, lora_dropout=DROPOUT, cache=False), clock]
    trainer = Trainer(max_steps=steps, accelerator="auto", devices=1, callbacks=callbacks, **quiet)
    begun = time.perf_counter()
    trainer.fit(lm, SFTDataModule(Files(str(file)), model, template="alpaca", batch_size=BATCH))
    return clock.ends[0] - begun


def arguments(steps: int, **options: Any) -> dict[str, Any]:
    """What the Hugging Face Trainer and TRL's are both told."""
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": 3e-4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not ON_GPU,
        "disable_tqdm": True,
        "logging_strategy": "no",
        **options,
    }


def device() -> str:
    return "cuda" if ON_GPU else "cpu"


def peft(clock: DeviceClock, steps: int, model: str, file: Path) -> None:
    import transformers
    from peft import get_peft_model

    tokenizer = load_tokenizer(model)
    examples = tokenize_dataset(Files(str(file)).load("train"), tokenizer, template="alpaca")  # type: ignore[arg-type]
    rows = [
        {"input_ids": ids, "labels": [-100] * start + ids[start:]}
        for ids, start in zip(examples["input_ids"][:], examples["prompt_length"][:], strict=True)
    ]
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    adapted = get_peft_model(load_causal_lm(model, "bfloat16").to(device()), peft_config(DROPOUT))
    args = transformers.TrainingArguments(**arguments(steps))
    trainer = transformers.Trainer(adapted, args, collator, rows)
    count(clock, trainer)
    trainer.train()


def trl(clock: DeviceClock, steps: int, model: str, file: Path, **options: Any) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(model)
    problems: Any = Files(str(file)).load("train")
    prompts = tokenize_dataset(problems, tokenizer, template="alpaca")["prompt"][:]
    rows = Dataset.from_dict({"prompt": prompts, "completion": [str(x) for x in problems["response"][:]]})
    config = SFTConfig(**arguments(steps, **{"bf16": ON_GPU, "gradient_checkpointing": False, **options}))
    loaded = load_causal_lm(model, "bfloat16").to(device())
    trainer = SFTTrainer(
        loaded, config, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config(DROPOUT)
    )
    count(clock, trainer)
    trainer.train()


# What is run, and how many steps come before those that are counted.
CONTENDERS: dict[str, tuple[Callable[..., float | None], int]] = {
    "milora-lightning": (ours, 5),
    "milora-lightning, `compile: true`": (partial(ours, compile=True), 10),
    "PEFT, Hugging Face Trainer": (peft, 5),
    "TRL": (trl, 5),
    "TRL, packed": (partial(trl, packing=True, max_length=1024, per_device_train_batch_size=BATCH // 4), 5),
    "TRL, Liger kernels": (partial(trl, use_liger_kernel=True), 5),
}


def available() -> dict[str, tuple[Callable[..., float | None], int]]:
    """Return the contenders whose packages are installed."""
    needed = {"TRL": "trl", "Liger": "liger_kernel"}
    missing = [word for word, package in needed.items() if importlib.util.find_spec(package) is None]
    for word in missing:
        print(f"{word} is not installed (pip install {needed[word].replace('_', '-')}).", file=sys.stderr)
    return {name: how for name, how in CONTENDERS.items() if not any(word in name for word in missing)}


def write_model(folder: Path, sizes: dict[str, int]) -> Path:
    """Write a model of random weights, with the embedded model's tokenizer."""
    AutoTokenizer.from_pretrained(load_tokenizer("embedded").name_or_path).save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), **special)  # type: ignore[arg-type]
    with torch.device(device()):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def write_examples(path: Path, number: int, mean: float) -> Path:
    """Write examples of random words, whose lengths vary as those of solved word problems do."""
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("an", "be", "co", "de", "in", "re") for b in ("der", "ing", "ter", "on", "al")]

    def text(length: float) -> str:
        return " ".join(draw.choice(words) for _ in range(max(4, int(draw.lognormvariate(0, 0.4) * length))))

    rows = [{"instruction": text(0.35 * mean), "output": text(0.65 * mean)} for _ in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measure(contender: str, model: str, file: str, steps: int) -> None:
    """Train as one process, and print what was found."""
    torch.manual_seed(0)
    run, warm_up = CONTENDERS[contender]
    clock = DeviceClock((warm_up, warm_up + steps))
    start = run(clock, warm_up + steps, model, Path(file))
    seconds = clock.ends[warm_up + steps - 1] - clock.ends[warm_up - 1]
    tokens = sum(int(each) for each in clock.tokens[warm_up : warm_up + steps])
    peak = torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else float("nan")
    print(json.dumps({"rate": tokens / seconds, "memory": peak, "start": start}))


def rows_of(model: str, file: Path, steps: int, rounds: int) -> list[list[str]]:
    found: dict[str, list[dict[str, float]]] = {contender: [] for contender in available()}
    for number in range(rounds):
        for contender, results in found.items():
            command = [sys.executable, __file__, "--measure", contender, model, str(file), str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["?"])[-1]
                print(f"{contender}: {reason}", file=sys.stderr, flush=True)
                continue
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}, {contender}: {results[-1]}", file=sys.stderr, flush=True)
    median = {
        who: {key: statistics.median(result[key] or 0 for result in results) for key in results[0]}
        for who, results in found.items()
        if results
    }
    base = median.get("PEFT, Hugging Face Trainer", {"rate": float("nan")})["rate"]
    return [
        [
            who,
            *(("failed", "", "", "") if who not in median else ()),
            *(_cells(median[who], base) if who in median else ()),
        ]
        for who in found
    ]


def _cells(result: dict[str, float], base: float) -> tuple[str, str, str, str]:
    start = f"{result['start']:.0f} s" if result["start"] else ""
    return f"{result['rate']:.0f}", f"{result['rate'] / base:.2f}×", f"{result['memory']:.1f} GB", start


def main(model: str | None, tiny: bool) -> None:
    steps, rounds = (2, 1) if tiny else (20, ROUNDS)
    if not ON_GPU and not tiny:
        sys.exit("There is no CUDA device: --tiny tries the script on the CPU.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = write_examples(folder / "train.jsonl", 16 * 40 if tiny else 16 * 200, 20 if tiny else 130)
        name = model or str(write_model(folder / "model", TINY if tiny else BILLION))
        rows = rows_of(name, file, steps, rounds)
    packages = ("peft", "transformers", *(p for p in ("trl", "liger_kernel") if importlib.util.find_spec(p)))
    card = torch.cuda.get_device_name() if ON_GPU else "no GPU"
    note = (
        f"{card}, CUDA {torch.version.cuda}: tokens without padding in a second; {steps} steps of {BATCH} examples, "
        f"medians of {rounds} alternating rounds; {', '.join(f'{name} {version(name)}' for name in packages)}. "
        "The start is all that comes before the end of the first step: loading, tokenizing, decompositions."
    )
    what = model or "1.1B, random weights"
    columns = [f"{what}, bfloat16, dropout {DROPOUT:g}", "tokens/s", "of PEFT's", "peak memory", "start"]
    text = f"{table(columns, rows)}\n\n{note}"
    print(text) if tiny else publish("gpu_training", text, RESULTS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:5], steps=int(sys.argv[5]))
    else:
        names = [word for word in sys.argv[1:] if not word.startswith("-")]
        main(names[0] if names else None, "--tiny" in sys.argv)
