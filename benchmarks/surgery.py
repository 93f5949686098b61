"""Time to put adapters on a whole model and initialize them, against PEFT, and once more with what the first run kept.

Every linear layer, r = 32. PEFT's ``pissa`` and ``mica`` compute a full SVD of each weight. The embedded model comes in
two dtypes; the random Llama has the layers of a model with a billion parameters, but two of its sixteen.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from common import alternate, publish, table
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.pretrained import cache_folder, load_causal_lm

ROUNDS = 3
LLAMA = LlamaConfig(
    vocab_size=1024,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=8,
)
CONTENDERS = {
    "`milora`": ("milora", False),
    "`milora`, second run": ("milora", True),
    "`pissa`": ("pissa", False),
    "PEFT's `pissa`": ("pissa", None),
    "PEFT's `mica`": ("mica", None),
}


def embedded(dtype: str) -> PreTrainedModel:
    return load_causal_lm("embedded", dtype)


def llama(dtype: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA, dtype=getattr(torch, dtype))


MODELS: dict[str, tuple[str, Callable[[str], PreTrainedModel], str]] = {
    "embedded-float32": ("embedded model, float32", embedded, "float32"),
    "embedded-bfloat16": ("embedded model, bfloat16", embedded, "bfloat16"),
    "llama-float32": ("2 layers of a 1B-shaped Llama, float32", llama, "float32"),
}


def operate(fresh: list[PreTrainedModel], init: str, cache: bool | None) -> None:
    model = fresh.pop()
    if cache is None:
        config = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", init_lora_weights=init)  # type: ignore[arg-type]
        get_peft_model(model, config)
    else:
        inject(model, LoRAConfig(r=32, init=init))  # type: ignore[arg-type]
        initialize(model, cache=cache)


def isolate_cache() -> None:
    """Use a new cache folder, with the converted model in it."""
    folder = Path(tempfile.mkdtemp())
    (cache_folder() / "models").mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to((cache_folder() / "models").absolute())
    os.environ["MILORA_CACHE"] = str(folder)


def main(names: list[str]) -> None:
    isolate_cache()
    for name in names:
        title, load, dtype = MODELS[name]
        operate([load(dtype)], "milora", True)  # the first run, whose decompositions the second finds
        fresh = [load(dtype) for _ in range(ROUNDS * len(CONTENDERS))]  # surgery changes a model: one for each
        seconds = alternate({label: partial(operate, fresh, *how) for label, how in CONTENDERS.items()}, ROUNDS)
        base = seconds["PEFT's `pissa`"]
        rows = [[label, f"{value:.2f}", f"{base / value:.1f}×"] for label, value in seconds.items()]
        matrices = sum(isinstance(m, torch.nn.Linear) for m in load(dtype).modules()) - 1
        note = f"{title}: {matrices} matrices, medians of {ROUNDS} alternating rounds; PEFT {version('peft')}."
        publish(f"surgery_{name}", table(["start", "seconds", "faster than PEFT's `pissa`"], rows) + f"\n\n{note}")
    shutil.rmtree(os.environ["MILORA_CACHE"])


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODELS))
