"""Chooses the device and precision of a decomposition: the fastest, according to rates measured here."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from milora_lightning.linalg import costs
from milora_lightning.linalg.eigen import NOT_CONVERGED
from milora_lightning.linalg.single import full_precision
from milora_lightning.utils.messages import inform, warn

Result = TypeVar("Result")

CPU = torch.device("cpu")

WORTH = 2.0
"""Minimum speed-up over float64 on the weight's device before another way is chosen, so that close calls are stable."""

CRAWL = 10.0
"""Decompositions shorter than this (seconds) never count as slow: the first one also loads libraries."""

SLOW = 4.0
"""How many times slower than the CPU a device may be for a size before that size is decomposed on the CPU."""

_LIBRARIES = re.compile("cusolver|cublas|magma|hipsolver|rocsolver|hipblas|rocblas", re.IGNORECASE)
_SIZE = 1024
_slow: set[tuple[torch.device, int, int]] = set()


_layer: ContextVar[str | None] = ContextVar("layer", default=None)


class Way(NamedTuple):
    """How to decompose a weight.

    Attributes:
        device: The device to compute on.
        single: Whether to try float32 with refinement first. If the result is not certified, float64 follows.
    """

    device: torch.device
    single: bool = False


@contextmanager
def decomposing(layer: str) -> Iterator[None]:
    """Make warnings about decompositions within this context name the layer.

    Args:
        layer: Name of the layer whose weight is decomposed.
    """
    token = _layer.set(layer)
    try:
        yield
    finally:
        _layer.reset(token)


def in_best_way(decompose: Callable[[Way], Result], device: torch.device, shape: tuple[int, int], r: int) -> Result:
    """Decompose in the fastest way, and on the CPU if the device's library or memory fails.

    Args:
        decompose: Function of a :class:`Way` that computes the result. It may be called twice, so it must not change
            its inputs.
        device: The weight's device.
        shape: The weight's shape.
        r: Number of triplets.
    """
    chosen, started = best_way(device, shape, r), time.perf_counter()
    try:
        result = decompose(chosen)
    except RuntimeError as error:  # including torch's LinAlgError and OutOfMemoryError
        if chosen.device.type == "cpu" or not _is_of_the_device(error):
            raise
        problem = (str(error).splitlines() or [type(error).__name__])[0]
    else:
        _note_time(chosen.device, shape, r, time.perf_counter() - started)
        return result
    # Not within the except clause, which keeps the failed attempt's tensors.
    layer = _layer.get()
    what = f"a weight of {shape[0]} x {shape[1]}" + (f", that of layer {layer!r}" if layer else "")
    warn(
        f"{device} could not decompose {what} ({problem}): the CPU does it, with the same result, but takes longer.",
        from_any_rank=True,
    )
    return decompose(Way(CPU))


def best_way(device: torch.device, shape: tuple[int, int], r: int) -> Way:
    """Choose how to decompose a weight, from its device's measured speed in float64 and float32.

    Data centre GPUs compute float64 at half their speed in float32, consumer GPUs at 1/64, some devices not at all.

    Args:
        device: The weight's device.
        shape: Its shape.
        r: Number of triplets.

    >>> best_way(torch.device("cpu"), (4096, 4096), 64)
    Way(device=device(type='cpu'), single=False)
    """
    if device.type == "cpu":
        return Way(device)
    k, n = sorted(shape)
    if (device, k, n) in _slow:
        return Way(CPU)
    double, single = rate(device, torch.float64), rate(device, torch.float32)
    seconds = {
        Way(device): costs.in_double(k, n).seconds(double, single) / WORTH,
        Way(device, single=True): costs.in_single(k, n, r).seconds(double, single),
        Way(CPU): seconds_on_cpu(k, n, r),
    }
    return min(seconds, key=lambda each: seconds[each])


def seconds_on_cpu(k: int, n: int, r: int) -> float:
    """Return how long r triplets of a weight (k, n) are expected to take on the CPU."""
    return costs.on_cpu(k, n, r).seconds(rate(CPU, torch.float64), 0.0)


def _note_time(device: torch.device, shape: tuple[int, int], r: int, seconds: float) -> None:
    """Send a size to the CPU from now on if a device has taken far longer than the CPU would.

    Some versions of cuSOLVER are extremely slow for some sizes, which the speed of matrix products does not predict.
    """
    k, n = sorted(shape)
    if device.type == "cpu" or (device, k, n) in _slow:
        return
    if seconds > max(CRAWL, SLOW * (expected := seconds_on_cpu(k, n, r))):
        _slow.add((device, k, n))
        inform(
            f"Decomposing a weight of {k} x {n} has taken {seconds:.1f} s on {device}; the CPU should take "
            f"{expected:.1f} s, and gets the next ones of this size."
        )


def at_home(x: Tensor, device: torch.device) -> Tensor:
    """Move a result to a device, in float64 if the device supports it."""
    return x.to(torch.float64 if has_double(device) else torch.float32).to(device)


def has_double(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    return device.type == "cpu" or rate(device, torch.float64) > 0


@cache
def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the speed of a matrix product in operations per second, once per process; 0 if the dtype is unsupported.

    >>> rate(torch.device("cpu"), torch.float64) > 1e6
    True
    """
    try:
        A = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # how mps and some xpu devices refuse float64
        return 0.0
    best = float("inf")
    with full_precision():
        for _ in range(3):  # the first one loads libraries
            started = time.perf_counter()
            (A @ A)[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - started)
    return 2 * _SIZE**3 / best


def _is_of_the_device(error: RuntimeError) -> bool:
    """Whether an error comes from a device's memory or library rather than from this package."""
    return isinstance(error, (*NOT_CONVERGED, torch.OutOfMemoryError)) or _LIBRARIES.search(str(error)) is not None
