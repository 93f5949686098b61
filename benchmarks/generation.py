"""Time to answer word problems greedily, against the same adapters in PEFT, unmerged.

The embedded model, 64 generated problems of mixed lengths, 32 at a time. Ours answers them as `test` does. PEFT's model
generates by transformers from the same batches, padded to the longest prompt, and from batches of the data's order. In
float32 all compute the same texts; how many are equal is counted. The adapters are exported from a model whose factors
have moved a little at random, so that there is something to compute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
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


def as_peft(module: CausalLMModule) -> PeftModel:
    with tempfile.TemporaryDirectory() as folder:
        export_peft(module, Path(folder) / "adapter")
        return PeftModel.from_pretrained(load_causal_lm("embedded", "float32"), Path(folder) / "adapter").eval()


def main() -> None:
    data = SFTDataModule(
        WordProblems(train_size=1, validation_size=1, test_size=PROBLEMS), "embedded", generation_batch_size=BATCH
    )
    data.setup("test")
    ours = adapted()
    theirs = as_peft(ours)
    texts: dict[str, dict[str, str]] = {}

    def peft_generate(batch: dict[str, Any]) -> list[str]:
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        tokens = theirs.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
        return list(data.tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True))

    def answer(name: str, generate: Callable[[dict[str, Any]], list[str]], loader: Iterable[dict[str, Any]]) -> None:
        pairs = [pair for batch in loader for pair in zip(batch["prompt"], generate(batch), strict=True)]
        texts[name] = dict(pairs)

    by_length, in_order = list(data.test_dataloader()[1]), list(data.predict_dataloader())
    contenders = {
        "milora-lightning": (ours.generate, by_length),
        "PEFT, unmerged, the same batches": (peft_generate, by_length),
        "PEFT, unmerged, in the data's order": (peft_generate, in_order),
    }
    found = alternate({name: partial(answer, name, *how) for name, how in contenders.items()}, ROUNDS)
    rows = [[name, f"{seconds:.1f}", f"{seconds / found['milora-lightning']:.2f}×"] for name, seconds in found.items()]
    answers = list(texts.values())
    equal = sum(all(other[prompt] == text for other in answers) for prompt, text in answers[0].items())
    note = (
        f"At most {NEW_TOKENS} tokens each, {equal} of {PROBLEMS} texts equal in all three; medians of {ROUNDS} "
        f"alternating rounds; PEFT {version('peft')}."
    )
    publish("generation", table([f"{PROBLEMS} answers, float32", "seconds", "of ours"], rows) + f"\n\n{note}")


if __name__ == "__main__":
    main()
