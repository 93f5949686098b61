"""Memory and surgery of a model in shards on two processes, against one process that holds it whole.

A random Llama, read from bfloat16 safetensors into float32; every process is fresh, runs on the CPU and has one thread.
Memory is a process's own (anonymous pages, sampled) above what it had with everything imported: pages of files that are
read belong to the system, which is why the weights are of another dtype there. Freed memory goes back to the system at
once (MALLOC_MMAP_THRESHOLD_), so that a peak is what is needed and not what the allocator keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch
from common import publish, table
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from milora_lightning import CausalLMModule, MiLoRAInit

ROUNDS, STEPS, LENGTH, VOCABULARY = 3, 3, 64, 1024
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=1536,
    intermediate_size=4096,
    num_hidden_layers=8,
    num_attention_heads=24,
    num_key_value_heads=8,
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
KINDS = {"auto": ("one process", []), "ddp": ("DDP", TORCHRUN), "fsdp2": ("FSDP2", TORCHRUN)}
STAGES = {"model": "model loaded", "surgery": "surgery", "training": "training"}


class PeakMemory:
    """The most anonymous memory of this process, in bytes, since it was last asked for."""

    def __init__(self) -> None:
        self.start, self.most = anonymous(), 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def take(self) -> int:
        """Return it, and begin anew."""
        most, self.most = max(self.most, anonymous()), 0
        return most - self.start


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Measured(MiLoRAInit):
    """Notes the peak of each stage, and the time of the surgery."""

    def __init__(self, peak: PeakMemory) -> None:
        super().__init__(r=32, target_modules=["q_proj", "up_proj", "down_proj"], cache=False)
        self.peak = peak
        self.found: dict[str, float] = {}

    def _initialize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.found:
            return  # it is called in two places, and does nothing the second time
        self.found["model"] = self.peak.take()
        trainer.strategy.barrier()
        started = time.perf_counter()
        super()._initialize(trainer, pl_module)
        self.found["seconds"] = time.perf_counter() - started
        self.found["surgery"] = self.peak.take()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last peak."""
        self.found["training"] = self.peak.take()


def measure(folder: Path, kind: str) -> None:
    """Train a few steps as one of the processes, and write down what was found."""
    two = kind != "auto"
    measured = Measured(PeakMemory())
    trainer = Trainer(
        accelerator="cpu",
        devices=2 if two else 1,
        strategy=ModelParallelStrategy(2, 1) if kind == "fsdp2" else kind,
        max_steps=STEPS,
        callbacks=[measured],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = torch.randint(0, VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    trainer.fit(CausalLMModule(str(folder / "model"), "float32"), DataLoader(batches, batch_size=1 if two else 2))
    (folder / f"{kind}{trainer.global_rank}.json").write_text(json.dumps(measured.found))


def write_model(folder: Path) -> int:
    """Write the model and a tokenizer; return the size of the weights in bytes, as trained on."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(folder / "model")
    words = {f"<{number}>": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>").save_pretrained(folder / "model")
    return (folder / "model" / "model.safetensors").stat().st_size * 2


def main() -> None:
    results: dict[str, list[list[dict[str, float]]]] = {kind: [] for kind in KINDS}  # by round and rank
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder)
        for number in range(ROUNDS):
            for kind, (_, launcher) in KINDS.items():
                command = [sys.executable, *launcher, __file__, str(folder), kind]
                subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True, capture_output=True)
                files = sorted(folder.glob(f"{kind}?.json"))
                results[kind].append([json.loads(file.read_text()) for file in files])
                print(f"round {number + 1}, {kind}: {results[kind][-1]}", file=sys.stderr, flush=True)

    seconds = {kind: median(max(rank["seconds"] for rank in ranks) for ranks in of) for kind, of in results.items()}
    rows = []
    for kind, of in results.items():
        peaks = [median(max(rank[stage] for rank in ranks) for ranks in of) for stage in STAGES]
        cells = [f"{peak / 1e6:.0f} MB" for peak in peaks]
        rows.append([KINDS[kind][0], *cells, f"{seconds[kind]:.1f} s", f"{seconds[kind] / seconds['auto']:.2f}"])
    columns = ["", *(f"peak: {stage}" for stage in STAGES.values()), "surgery", "relative to one process"]
    title = (
        f"The model is {size / 1e6:.0f} MB in float32; 24 matrices, r = 32. Two processes of one thread each against "
        f"one, the larger of the two, medians of {ROUNDS} alternating rounds."
    )
    publish("scaling", table(columns, rows) + f"\n\n{title}")


if __name__ == "__main__":
    measure(Path(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else main()
