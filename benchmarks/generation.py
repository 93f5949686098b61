"""Time to answer word problems greedily, against the same adapters in PEFT, unmerged.

The embedded model in float32, in which both compute the same texts, which is checked; 64 generated problems of mixed
lengths, 32 at a time. The adapters are exported from a model whose factors have moved a little at random, so that there
is something to compute.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import alternate, publish, table
from peft import PeftModel

from milora_lightning import CausalLMModule, LoRAConfig, SFTDataModule, export_peft, initialize, inject, lora_layers
from milora_lightning.data import WordProblems
from milora_lightning.pretrained import load_causal_lm

PROBLEMS, BATCH, NEW_TOKENS, ROUNDS = 64, 32, 64, 3


def adapted() -> CausalLMModule:
    module = CausalLMModule("embedded", dtype="float32", max_new_tokens=NEW_TOKENS)
    module.configure_model()
    inject(module, LoRAConfig(r=32))
    initialize(module)
    torch.manual_seed(0)
    for layer in lora_layers(module).values():
        layer.lora_B.data += 0.01 * layer.lora_B.std() * torch.randn_like(layer.lora_B)
    return module.eval()


def main() -> None:
    data = SFTDataModule(
        WordProblems(train_size=1, validation_size=1, test_size=PROBLEMS), "embedded", generation_batch_size=BATCH
    )
    data.setup("predict")
    batches: list[dict[str, Any]] = list(data.predict_dataloader())
    ours = adapted()
    with tempfile.TemporaryDirectory() as folder:
        export_peft(ours, Path(folder) / "adapter")
        theirs = CausalLMModule("embedded", dtype="float32", max_new_tokens=NEW_TOKENS)
        theirs.configure_model()
        theirs.model = PeftModel.from_pretrained(load_causal_lm("embedded", "float32"), Path(folder) / "adapter").eval()
    texts: dict[str, list[str]] = {}

    def answer(name: str, module: CausalLMModule) -> None:
        texts[name] = [text for batch in batches for text in module.generate(batch)]

    names = {"milora-lightning": ours, "PEFT, unmerged": theirs}
    found = alternate({name: lambda name=name, m=m: answer(name, m) for name, m in names.items()}, ROUNDS)
    equal = sum(a == b for a, b in zip(*texts.values(), strict=True))
    base = found["PEFT, unmerged"]
    rows = [[name, f"{value:.1f} s", f"{base / value:.2f}×"] for name, value in found.items()]
    note = (
        f"{PROBLEMS} answers of at most {NEW_TOKENS} tokens, {equal} of them equal; medians of {ROUNDS} alternating "
        f"rounds; PEFT {version('peft')}."
    )
    publish("generation", table(["", "time", "faster"], rows) + f"\n\n{note}")


if __name__ == "__main__":
    main()
