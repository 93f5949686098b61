"""Numbers, durations, speeds and memory as text."""

from __future__ import annotations

import math

import torch

from milora_lightning.utils.process_memory import peak_resident


def number(value: float) -> str:
    """Format a number with four significant digits, without rounding small numbers to zero.

    >>> [number(x) for x in (0.0, 3e-4, 1.25e-5, 0.81234, 12.3456, 512.34, 81234.0, float("nan"))]
    ['0', '3e-4', '1.25e-5', '0.8123', '12.35', '512.3', '81234', 'nan']
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-2:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds.

    >>> duration(75), duration(3 * 3600 + 5), duration(100 * 3600)
    ('0:01:15', '3:00:05', '100:00:00')
    """
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def speed(per_second: float, unit: str) -> str:
    """Format a speed, as units per second or, below one, as seconds per unit.

    >>> speed(512.4, "tokens"), speed(2.5, "steps"), speed(0.05, "steps")
    ('512 tokens/s', '2.5 steps/s', '20 s a step')
    """
    if 0 < per_second < 1:
        return f"{1 / per_second:.3g} s a {unit.removesuffix('s')}"
    return f"{per_second:.0f} {unit}/s" if per_second >= 100 else f"{per_second:.3g} {unit}/s"


def progress(done: float, total: float | None) -> str:
    """Format a count, with its total if that is known.

    >>> progress(3, 8), progress(3, None), progress(3, float("inf"))
    ('3 of 8', '3', '3')
    """
    return f"{done:.0f} of {total:.0f}" if total is not None and math.isfinite(total) else f"{done:.0f}"


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory so far in GB: that of a CUDA device, otherwise the resident memory of the process.

    None if the system does not report it. Does not synchronize with the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = peak_resident()
    return None if peak is None else peak / 1e9
