"""Time and memory of each start: on the embedded model, and on one weight of 4096 by 11008.

Every start that the registry has and that needs no data, each in a process of its own, without cached decompositions.
Starts that need data, and those that differ by singular values alone, take what the directions of one of these take.

python benchmarks/starts.py          # about four minutes; publishes a table
python benchmarks/starts.py small    # one block and a small weight, in seconds; prints a table
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
from collections.abc import Callable

import torch
from common import publish, table

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.models.pretrained import load_causal_lm
from milora_lightning.starts import algebra, registry
from milora_lightning.utils import process_memory

R_MODEL, R_WEIGHT = 32, 64
WEIGHT, SMALL_WEIGHT = (4096, 11008), (192, 256)
ALGEBRA = [*algebra.METHODS, "slice 0.25", "gaussian x minor"]

Measured = tuple[float, int]


def names() -> list[str]:
    """Return the starts that need no data."""
    registered = [name for name, start in registry._REGISTERED.items() if not getattr(start, "needs", None)]
    return [*ALGEBRA, *sorted(registered)]


def measured(work: Callable[[], object]) -> Measured:
    """Return the seconds that something takes, and the peak above the memory before, in bytes."""
    gc.collect()
    before, started = process_memory.resident() or 0, time.perf_counter()
    work()
    return time.perf_counter() - started, (process_memory.peak_resident() or 0) - before


def warm_up(init: str) -> None:
    """Have libraries loaded, which take seconds and memory of their own."""
    initial_factors(torch.randn(80, 96), R_WEIGHT, init=init)


def on_model(init: str, small: bool) -> Measured:
    """Put adapters on the embedded model, and initialize them."""
    model = load_causal_lm("embedded", "float32")
    if small:
        del model.model.layers[1:]
    config = LoRAConfig(r=R_MODEL, init=init)
    warm_up(init)

    def work() -> None:
        inject(model, config)
        initialize(model, cache=False)

    return measured(work)


def on_weight(init: str, small: bool) -> Measured:
    """Compute where the factors of one weight start."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SMALL_WEIGHT if small else WEIGHT, generator=generator)
    warm_up(init)
    return measured(lambda: initial_factors(weight, R_WEIGHT, init=init, generator=generator))


def alone(work: Callable[[str, bool], Measured], init: str, small: bool) -> Measured:
    """Measure in a fresh process, which has imported what it needs and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "milora_lightning.models.pretrained"])
    with context.Pool(1) as process:
        result: Measured = process.apply(work, (init, small))
    print(f"{init}, {work.__name__}: {result[0]:.2f} s, {result[1] / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return result


def main(small: bool) -> None:
    rows = []
    for init in names():
        (model_seconds, model_bytes), (seconds, size) = (alone(work, init, small) for work in (on_model, on_weight))
        rows.append([f"`{init}`", f"{model_seconds:.1f} s", f"{model_bytes / 1e6:.0f} MB", f"{seconds:.1f} s"])
        rows[-1].append(f"{size / 1e9:.2f} GB")
    out_features, in_features = SMALL_WEIGHT if small else WEIGHT
    title = f"embedded model, r = {R_MODEL}", "peak memory", f"one {out_features}×{in_features}, r = {R_WEIGHT}"
    text = table(["start", *title, "peak memory"], rows)
    if small:
        print(text)
    else:
        publish("starts", f"{text}\n\nfloat32, one run each. Memory is above that of the model, or the weight.")


if __name__ == "__main__":
    main(sys.argv[1:] == ["small"])
