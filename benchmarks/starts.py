"""Time and memory of each start: on the embedded model, and on one weight of 11008 by 4096.

Every start that the registry has, each in a process of its own, without cached decompositions. Those that differ from
another by singular values or by the end of a spectrum alone are left out. Starts from data collect statistics of 2048
tokens of the embedded model, which is part of their time there, and are given random ones of the single weight.

python benchmarks/starts.py          # about eleven minutes; publishes a table
python benchmarks/starts.py small    # one block and a small weight, in seconds; prints a table
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from common import publish, table

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.models.pretrained import load_causal_lm
from milora_lightning.starts import Statistics, algebra, find_start, registry
from milora_lightning.statistics.collecting import collect_statistics
from milora_lightning.utils import process_memory

R_MODEL, R_WEIGHT = 32, 64
WEIGHT, SMALL_WEIGHT = (11008, 4096), (256, 192)
BATCHES, ROWS, LENGTH = 4, 4, 128
ALGEBRA = [*algebra.METHODS, "gaussian x minor"]

NOTE = "float32, one run each. Memory is above that of the model, or of the weight and what is known of its data."

Measured = tuple[float, int]


def names() -> list[str]:
    """Return the starts to measure, those that need data last."""
    registered = [start for name, start in sorted(registry._REGISTERED.items()) if not name.endswith("_ipm")]
    return [*ALGEBRA, *(start.name for start in sorted(registered, key=lambda start: bool(start.needs)))]


def measured(work: Callable[[], object]) -> Measured:
    """Return the seconds that something takes, and the peak above the memory before, in bytes."""
    gc.collect()
    with suppress(OSError):  # only Linux has this
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading the model
    before, started = process_memory.resident() or 0, time.perf_counter()
    work()
    return time.perf_counter() - started, (process_memory.peak_resident() or 0) - before


def random_statistics(init: str, shape: tuple[int, int]) -> Statistics | None:
    """Return what a start takes of data, of random inputs and gradients."""
    needs = find_start(init).needs
    if not needs:
        return None
    inputs = torch.randn(2 * shape[1], shape[1])
    moments, gradient = inputs.T @ inputs / len(inputs), torch.randn(shape)
    return Statistics(inputs=moments, gradient=gradient, mean=inputs.mean(0), preserved=moments)


def warm_up(init: str) -> None:
    """Have libraries loaded, which take seconds and memory of their own."""
    shape = (96, 160)
    initial_factors(torch.randn(shape), 32, init=init, statistics=random_statistics(init, shape))


def on_model(init: str, small: bool) -> Measured:
    """Put adapters on the embedded model, and initialize them."""
    model = load_causal_lm("embedded", "float32")
    if small:
        del model.model.layers[1:]
    config, needs = LoRAConfig(r=R_MODEL, init=init), find_start(init).needs
    ids = torch.randint(1000, 40000, (BATCHES, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": rows, "labels": rows} for rows in ids[: 1 if small else None]]
    warm_up(init)

    def work() -> None:
        inject(model, config)
        preserve = batches if "preserved" in needs else None
        statistics = collect_statistics(model, batches, preserve=preserve) if needs else None
        initialize(model, cache=False, statistics=statistics)

    return measured(work)


def on_weight(init: str, small: bool) -> Measured:
    """Compute where the factors of one weight start."""
    generator = torch.Generator().manual_seed(0)
    shape = SMALL_WEIGHT if small else WEIGHT
    weight, statistics = torch.randn(shape, generator=generator), random_statistics(init, shape)
    warm_up(init)
    return measured(lambda: initial_factors(weight, R_WEIGHT, init=init, generator=generator, statistics=statistics))


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
        publish("starts", f"{text}\n\n{NOTE}")


if __name__ == "__main__":
    main(sys.argv[1:] == ["small"])
