"""Time to put adapters on a whole model and initialize them, against PEFT, and once more with what the first run kept.

Every linear layer, r = 32. PEFT's ``pissa`` and ``mica`` compute a full SVD of each weight. The random Llama has the
layers of a model with a billion parameters, but two of its sixteen.
"""

from __future__ import annotations

import copy
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
from milora_lightning.models.pretrained import load_causal_lm
from milora_lightning.utils.folders import cache_folder

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


def embedded() -> PreTrainedModel:
    return load_causal_lm("embedded", "float32")


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float32)


MODELS: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "embedded": ("embedded model", embedded),
    "llama": ("2 layers of a 1B-shaped Llama", llama),
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


def measure(load: Callable[[], PreTrainedModel]) -> tuple[int, dict[str, float]]:
    """Return the number of matrices and the seconds of each contender."""
    pristine = load()
    matrices = len(inject(copy.deepcopy(pristine), LoRAConfig(r=32)))
    operate([copy.deepcopy(pristine)], "milora", True)  # the first run, whose decompositions the second finds
    # Surgery changes a model: one for each, made outside the measured time.
    fresh = [copy.deepcopy(pristine) for _ in range(ROUNDS * len(CONTENDERS))]
    return matrices, alternate({label: partial(operate, fresh, *how) for label, how in CONTENDERS.items()}, ROUNDS)


def main(names: list[str]) -> None:
    isolate_cache()
    for name in names:
        title, load = MODELS[name]
        matrices, seconds = measure(load)
        base = seconds["PEFT's `pissa`"]
        rows = [[label, f"{value:.2f}", f"{base / value:.1f}×"] for label, value in seconds.items()]
        columns = [f"{title}, {matrices} matrices", "seconds", "faster than PEFT's `pissa`"]
        note = f"float32, medians of {ROUNDS} alternating rounds; PEFT {version('peft')}."
        publish(f"surgery_{name}", table(columns, rows) + f"\n\n{note}")
    shutil.rmtree(os.environ["MILORA_CACHE"])


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODELS))
