"""Time to put adapters on a whole model and initialize them, against PEFT.

The embedded model in float32, every linear layer, r = 32. PEFT's ``pissa`` computes a full SVD of each weight.
"""

from __future__ import annotations

from importlib.metadata import version

from common import alternate, publish, table
from peft import LoraConfig, get_peft_model

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.pretrained import load_causal_lm


def main() -> None:
    fresh = [load_causal_lm("embedded", "float32") for _ in range(9)]  # surgery changes a model: one for each run

    def ours(init: str) -> None:
        model = fresh.pop()
        inject(model, LoRAConfig(r=32, init=init))  # type: ignore[arg-type]
        initialize(model, cache=False)

    def peft() -> None:
        get_peft_model(
            fresh.pop(), LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", init_lora_weights="pissa")
        )

    names = {"`milora`": lambda: ours("milora"), "`pissa`": lambda: ours("pissa"), "PEFT's `pissa`": peft}
    seconds = alternate(names, rounds=3)
    base = seconds["PEFT's `pissa`"]
    rows = [[name, f"{value:.1f}", f"{base / value:.1f}×"] for name, value in seconds.items()]
    title = f"210 matrices, median of 3 alternating rounds; PEFT {version('peft')}."
    publish("surgery", table(["start", "seconds", "faster than PEFT's `pissa`"], rows) + f"\n\n{title}")


if __name__ == "__main__":
    main()
