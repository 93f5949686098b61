"""What the benchmark scripts share: alternating rounds, the machine's kind, plots, and tables in the README."""

from __future__ import annotations

import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

README = Path(__file__).parent.parent / "README.md"
PLOTS = Path(__file__).parent / "plots"


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run all contenders in turn, round after round, and return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
            print(f"round {number + 1}, {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_seconds(run: Callable[[], object], rounds: int = 3) -> float:
    """Run something several times, and return the median seconds."""
    return alternate({"run": run}, rounds)["run"]


def machine() -> str:
    """Name the kind of machine and the versions that matter."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        name = found[1]
    return f"{torch.get_num_threads()} cores of {name}, torch {version('torch').split('+')[0]}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def growth_plot(name: str, xlabel: str, series: dict[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """Plot seconds on logarithmic axes into plots/NAME.png; return each curve's exponent, fitted to its upper half."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    exponents = {}
    for label, (x, seconds) in series.items():
        upper = slice(len(x) // 2, None)
        exponents[label] = float(np.polyfit(np.log(x[upper]), np.log(seconds[upper]), 1)[0])
        axes.loglog(x, seconds, marker="o", label=f"{label}: exponent {exponents[label]:.1f}")
    axes.set(xlabel=xlabel, ylabel="seconds")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_plot(name, figure)
    return exponents


def save_plot(name: str, figure: Figure) -> None:
    """Save a figure as plots/NAME.png."""
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / f"{name}.png", dpi=120)


def publish(name: str, text: str) -> None:
    """Print a result, and put it into the README between the marks of its name."""
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *(Path(word).name for word in sys.argv[1:])])
    text = f"{text}\n\n({machine()}; `{command}`)"
    print(text)
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    readme = README.read_text()
    if begin not in readme:
        raise SystemExit(f"README.md has no place marked {begin}")
    head, rest = readme.split(begin)
    README.write_text(head + begin + "\n" + text + "\n" + end + rest.split(end)[1])
