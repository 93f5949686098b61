"""Training throughput and peak memory on real word problems, against PEFT with the Hugging Face Trainer, and TRL.

The embedded model, GSM8K's training problems of at most 400 tokens (a JSON lines file, the first argument) with Alpaca
prompts, batch 16, r = 32 on the paper's five target modules, AdamW, loss on the answers. Each run is a process of its
own. Of the batches that a trainer would make of an epoch, by default at random, ours of similar lengths, it takes the
widest, which decides on memory and is not counted, one more to warm up, and those in the middle of each quarter,
ordered by width. TRL runs at its defaults (which recompute activations and cast to bfloat16), and without those, with
the same number of tokens packed into rows of 1,024. Ours are padded to the longest row, PEFT's to a multiple of 8. More
arguments choose from the settings below.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import publish, table
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule
from milora_lightning.data import Files, tokenize_dataset
from milora_lightning.data.batches.sampling import grouped_order
from milora_lightning.models.pretrained import load_causal_lm, load_tokenizer
from milora_lightning.utils.process_memory import peak_resident

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
BATCH, WARM_UP, STEPS, ROUNDS = 16, 2, 4, 3
LONGEST = 400  # tokens; with the few longer problems PEFT needs more than 24 GB
SETTINGS = {"bfloat16": ("bfloat16", 0.0), "bfloat16-dropout": ("bfloat16", 0.05), "float32": ("float32", 0.0)}


class Clock(Callback):
    """Notes when steps end, and how many tokens are in them."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def note(self) -> None:
        """Note the end of a step."""
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note one of the Trainer's."""
        self.note()
        self.tokens.append(int(batch["attention_mask"].sum()))


def batches(lengths: Sequence[int], grouped: bool = False) -> list[list[int]]:
    """Choose from an epoch's batches the widest, another, and those in the middle of each part by width."""
    taken = np.flatnonzero(np.asarray(lengths) <= LONGEST)
    if grouped:
        order = grouped_order(np.asarray(lengths)[taken], seed=0, epoch=0, global_batch=BATCH, shuffle=True)
    else:
        order = np.random.default_rng(0).permutation(len(taken))
    epoch = taken[order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)]
    by_width = epoch[np.argsort(np.asarray(lengths)[epoch].max(1), kind="stable")]
    middles = [int((part + 0.5) / STEPS * len(by_width)) for part in range(STEPS)]
    return [by_width[place].tolist() for place in (-1, len(by_width) // 2, *middles)]


class Problems(SFTDataModule):
    """Training problems in the chosen batches."""

    def train_dataloader(self) -> Any:
        """Return them, made as ever."""
        made = self.epoch()
        chosen = batches(self.examples("train")["length"][:], grouped=True)
        return DataLoader(made.dataset, batch_sampler=chosen, collate_fn=made.collate_fn)


def in_order(trainer: type, lengths: Sequence[int], grouped: bool) -> Any:
    """Make of a Hugging Face trainer's class one that takes the chosen batches."""

    class InOrder(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return [index for batch in batches(lengths, grouped) for index in batch]

    return InOrder


def ours(clock: Clock, steps: int, source: Files, dtype: str, dropout: float, compile: bool = False) -> None:
    options = {"dtype": dtype, "attn_implementation": "causal_blocks", "warmup_steps": 0, "compile": compile}
    lm = CausalLMModule("embedded", **options)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    callbacks = [MiLoRAInit(r=32, target_modules=TARGETS, lora_dropout=dropout), clock]
    trainer = Trainer(max_steps=steps, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(lm, Problems(source, "embedded", template="alpaca", batch_size=BATCH, pad_to_multiple_of=1))


def peft_config(dropout: float) -> Any:
    from peft import LoraConfig

    config = {"r": 32, "lora_alpha": 32, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return LoraConfig(lora_dropout=dropout, **config)  # type: ignore[arg-type]


def arguments(steps: int) -> dict[str, Any]:
    """What the Hugging Face Trainer and TRL's are both told."""
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": 3e-4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }


def count(clock: Clock, trainer: Any) -> None:
    """Have a Hugging Face trainer note the ends of its steps and the tokens in them."""
    import transformers

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.note()

    collate = trainer.data_collator

    def counting(rows: list[dict[str, Any]]) -> Any:
        batch = collate(rows)
        mask = batch.get("attention_mask")
        clock.tokens.append(batch["input_ids"].numel() if mask is None else int(mask.sum()))
        return batch

    trainer.data_collator = counting
    trainer.add_callback(Ends())


def peft(clock: Clock, steps: int, source: Files, dtype: str, dropout: float, grouped: bool = False) -> None:
    import transformers
    from peft import get_peft_model

    tokenizer = load_tokenizer("embedded")
    examples = tokenize_dataset(source.load("train"), tokenizer, template="alpaca")  # type: ignore[arg-type]
    rows = [
        {"input_ids": ids, "labels": [-100] * start + ids[start:]}
        for ids, start in zip(examples["input_ids"][:], examples["prompt_length"][:], strict=True)
    ]
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    model = get_peft_model(load_causal_lm("embedded", dtype), peft_config(dropout))
    kind = in_order(transformers.Trainer, [len(row["input_ids"]) for row in rows], grouped)
    trainer = kind(model, transformers.TrainingArguments(**arguments(steps)), collator, rows)
    count(clock, trainer)
    trainer.train()


def trl(clock: Clock, steps: int, source: Files, dtype: str, dropout: float, **options: Any) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer("embedded")
    problems: Any = source.load("train")
    tokens = tokenize_dataset(problems, tokenizer, template="alpaca")
    rows = Dataset.from_dict({"prompt": tokens["prompt"][:], "completion": [str(x) for x in problems["response"][:]]})
    config = SFTConfig(**{**arguments(steps), **options})
    model = load_causal_lm("embedded", dtype)
    lengths = tokens["length"][:]
    kind = SFTTrainer if options.get("packing") else in_order(SFTTrainer, lengths, grouped=False)
    trainer = kind(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config(dropout))
    count(clock, trainer)
    trainer.train()


BEST = {"gradient_checkpointing": False, "bf16": False, "packing": True, "per_device_train_batch_size": BATCH // 4}
CONTENDERS: dict[str, Callable[..., None]] = {
    "milora-lightning": ours,
    "milora-lightning, `compile: true`": partial(ours, compile=True),
    "PEFT, Hugging Face Trainer": peft,
    "PEFT, Hugging Face Trainer, in our batches": partial(peft, grouped=True),
    "TRL, defaults": trl,
    "TRL, packed": partial(trl, **BEST),
}


def measure(file: str, setting: str, contender: str) -> None:
    """Train as one process, and print what was found."""
    torch.manual_seed(0)
    clock = Clock()
    source = Files(train=file, prompt_field="question", response_field="answer", validation_size=0)
    CONTENDERS[contender](clock, WARM_UP + STEPS, source, *SETTINGS[setting])
    seconds = clock.ends[WARM_UP + STEPS - 1] - clock.ends[WARM_UP - 1]
    rate = sum(clock.tokens[WARM_UP : WARM_UP + STEPS]) / seconds
    print(json.dumps({"rate": rate, "memory": (peak_resident() or 0) / 2**30}))


def rows_of(file: str, setting: str) -> list[list[str]]:
    found: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
    for number in range(ROUNDS):
        for contender, results in found.items():
            command = [sys.executable, __file__, file, setting, contender]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}, {setting}, {contender}: {results[-1]}", file=sys.stderr, flush=True)
    rate, memory = (
        {who: statistics.median(result[key] for result in results) for who, results in found.items()}
        for key in ("rate", "memory")
    )
    base = rate["PEFT, Hugging Face Trainer"]
    return [[who, f"{rate[who]:.0f}", f"{rate[who] / base:.1f}×", f"{memory[who]:.1f} GB"] for who in found]


def main(file: str, settings: list[str]) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "trl"))
    note = (
        f"Tokens without padding in a second; {STEPS} steps of {BATCH} problems, medians of {ROUNDS} alternating "
        f"rounds; {versions}."
    )
    for setting in settings:
        columns = ["{}, dropout {:g}".format(*SETTINGS[setting]), "tokens/s", "of PEFT's", "peak memory"]
        publish(f"training_{setting}", f"{table(columns, rows_of(file, setting))}\n\n{note}")


if __name__ == "__main__":
    if not (len(sys.argv) > 1 and Path(sys.argv[1]).is_file()):
        sys.exit("Give the JSON lines file of GSM8K's training problems, with the fields question and answer.")
    if sys.argv[-1] in CONTENDERS:
        measure(*sys.argv[1:4])
    else:
        main(sys.argv[1], sys.argv[2:] or list(SETTINGS))
