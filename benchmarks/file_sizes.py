"""What a run leaves behind on disk: the embedded model in bfloat16, r = 32, the paper's five target modules."""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import publish, table
from lightning.pytorch import Trainer

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule, export_merged, export_peft
from milora_lightning.data import WordProblems

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def megabytes(path: Path) -> str:
    files = path.rglob("*") if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.0f} MB"


def main() -> None:
    module = CausalLMModule("embedded", dtype="bfloat16", warmup_steps=0)
    data = SFTDataModule(WordProblems(8, 8, 8, max_chars=320), "embedded", template="plain", batch_size=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = Trainer(max_steps=1, accelerator="cpu", callbacks=[MiLoRAInit(r=32, target_modules=TARGETS)], **quiet)
    trainer.fit(module, data)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("full.ckpt", "weights.ckpt", "peft", "merged")}
        trainer.save_checkpoint(paths["full.ckpt"])
        trainer.save_checkpoint(paths["weights.ckpt"], weights_only=True)
        export_peft(module, paths["peft"])
        export_merged(module, paths["merged"])
        rows = [
            ["checkpoint: adapters, initial factors, optimizer, loops", megabytes(paths["full.ckpt"])],
            ["checkpoint without the trainer's state", megabytes(paths["weights.ckpt"])],
            ["PEFT folder, rank 64", megabytes(paths["peft"])],
            ["merged model: the whole base, for comparison", megabytes(paths["merged"])],
        ]
    publish("file_sizes", table(["file", "size"], rows) + "\n\nAdapters are float32, the base is bfloat16.")


if __name__ == "__main__":
    main()
