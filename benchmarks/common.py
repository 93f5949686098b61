"""What the benchmark scripts share: alternating rounds, the machine's kind, and where results are published."""

from __future__ import annotations

import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from figures import COLUMNS, draw_tables

from milora_lightning.utils.markdown import table

__all__ = ["ROOT", "alternate", "machine", "median_seconds", "publish", "table"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "two_cores.md"


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


def publish(name: str, text: str, page: Path = RESULTS, measured: bool = True) -> None:
    """Print a result, write it between the marks of its name on a page, and draw the tables of its script again.

    Args:
        name: Its name.
        text: The result.
        page: The page.
        measured: Whether it was measured on this machine, which is named then.
    """
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *(Path(word).name for word in sys.argv[1:])])
    text = f"{text}\n\n({machine()}; `{command}`)" if measured else f"{text}\n\n(`{command}`)"
    print(text)
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before = page.read_text()
    if begin not in before:
        raise SystemExit(f"{page} has no place marked {begin}")
    head, rest = before.split(begin)
    after = head + begin + "\n" + text + "\n" + end + rest.split(end)[1]
    page.write_text(after)
    script = name.split("_")[0]
    if script in COLUMNS:
        draw_tables(script, after)
