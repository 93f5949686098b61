"""What a training step is made of: adapters against the frozen model, and everything against its matrix products.

One batch of 16 rows of random tokens each, half of which count, the embedded model, r = 32 on the paper's five target
modules. The frozen model is differentiated to its inputs, as adapters need it. The matrix products of a step are noted
while it runs, with their shapes, layouts and dtypes, and run again on random numbers by themselves. Then how a step's
time grows with r, with the batch and with the length, in bfloat16. To have memory kept between steps, set the variables
of `make fit`. Arguments choose from bfloat16, float32 and growth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import alternate, median_seconds, publish, table
from figures import growth_plot
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from milora_lightning import LoRAConfig, adapters_disabled, initialize, inject
from milora_lightning.models import attention
from milora_lightning.models.compile import compile_layers
from milora_lightning.models.loss import causal_lm_loss
from milora_lightning.models.pretrained import load_causal_lm

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
# Our own operations, whose products are to be seen: their Python functions.
INSIDE = {
    torch.ops.milora_lightning.causal_attention: attention._attend,
    torch.ops.milora_lightning.causal_attention_backward: attention._backward,
}
BATCH, LENGTH, R, ROUNDS = 16, 224, 32, 7
RANKS, BATCHES, LENGTHS = (8, 16, 32, 64, 128), (2, 4, 8, 16, 32), (64, 128, 256, 512)


def model_with(r: int, dtype: str = "bfloat16") -> Any:
    model = load_causal_lm("embedded", dtype, "causal_blocks").train()
    inject(model, LoRAConfig(r=r, target_modules=TARGETS))
    initialize(model)
    return model


def step(model: Any, batch: int = BATCH, length: int = LENGTH) -> None:
    """Differentiate the loss on random tokens, of which the second half counts."""
    input_ids = torch.randint(100, 40_000, (batch, length), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, : length // 2] = -100
    causal_lm_loss(model, input_ids, labels).backward()


class Products(TorchDispatchMode):
    """Notes the matrix products that are computed, with random tensors in place of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.arguments: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note it."""
        kwargs = kwargs or {}
        inside = INSIDE.get(function.overloadpacket)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        if function.overloadpacket.__name__ in PRODUCTS:
            like_args, like_kwargs = tree_map_only(Tensor, self._like, (args, kwargs))
            self.calls.append(lambda: function(*like_args, **like_kwargs))
        return function(*args, **kwargs)

    def _like(self, x: Tensor) -> Tensor:
        key = tuple(x.shape), x.stride(), x.dtype
        if key not in self.arguments:
            self.arguments[key] = torch.empty_strided(*key[:2], dtype=key[2]).normal_(std=0.01)
        return self.arguments[key]

    def run(self) -> None:
        """Compute them all again."""
        for call in self.calls:
            call()


def products_of(run: Callable[[], None]) -> Products:
    """Return the matrix products of something, which runs once before, so that what happens only once is over."""
    run()
    with Products() as products:
        run()
    return products


def shares(dtype: str) -> None:
    """Measure the adapters' share of a step, and that of matrix products."""
    model, compiled = model_with(R, dtype), model_with(R, dtype)
    compile_layers(compiled)
    model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_())  # for the frozen one

    def frozen() -> None:
        with adapters_disabled(model):
            step(model)

    steps = {
        "adapted": lambda: step(model),
        "adapted, compiled": lambda: step(compiled),
        "frozen": frozen,
    }
    products = {"adapted": products_of(steps["adapted"]), "frozen": products_of(frozen)}
    for _ in range(2):  # compiles, and has the memory that they all share grow to what it will be
        for run in steps.values():
            run()
    found = alternate({**steps, **{f"{name}, products": which.run for name, which in products.items()}}, ROUNDS)
    rows = []
    for name in steps:
        alone = found[f"{name.split(',')[0]}, products"]
        rows.append([name, f"{found[name]:.2f} s", f"{alone:.2f} s", f"{alone / found[name]:.0%}"])
    share, least = (found[f"adapted{what}"] / found[f"frozen{what}"] - 1 for what in ("", ", products"))
    note = (
        f"{BATCH} × {LENGTH} tokens, medians of {ROUNDS} alternating rounds. Adapters cost {share:.0%} more time, "
        f"their matrix products alone {least:.0%}."
    )
    columns = [f"{dtype}, forward and backward", "time", "its matrix products alone", "their share"]
    publish(f"step_{dtype}", f"{table(columns, rows)}\n\n{note}")


def growth() -> None:
    """Measure how the time of a step grows, and draw it."""
    model = model_with(R)
    series = {
        "r": (RANKS, [median_seconds(partial(step, model_with(r))) for r in RANKS]),
        "batch": (BATCHES, [median_seconds(lambda n=n: step(model, n)) for n in BATCHES]),
        "length": (LENGTHS, [median_seconds(lambda n=n: step(model, 4, n)) for n in LENGTHS]),
    }
    exponents = growth_plot("step", "r (batch 16), batch (of 224 tokens each), length (batch 4)", series)
    fits = ", ".join(f"{name} {value:.1f}" for name, value in exponents.items())
    note = f"Exponents of a step's time in bfloat16, not compiled: {fits}."
    publish("step_growth", f"![growth of a step's time](../plots/step.png)\n\n{note}")


PARTS = {"bfloat16": partial(shares, "bfloat16"), "float32": partial(shares, "float32"), "growth": growth}


if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
