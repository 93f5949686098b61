"""Training runs of a comparison in parallel, in processes that each have a device."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from milora_lightning.cli.comparing.single import Comparison
from milora_lightning.comparison.runs import Run
from milora_lightning.utils.errors import InvalidInputError

WORKER = [sys.executable, "-m", "milora_lightning.cli.comparing.worker"]
LOGS, LOG = "logs", "log.txt"
"""The folder for the output of unfinished runs, and the name of that output in a finished run's folder."""


@dataclass
class Worker:
    """A process that trains one run at a time."""

    environment: dict[str, str]
    process: subprocess.Popen[str] | None = None

    def train(self, job: dict[str, Any]) -> str | None:
        """Train a run in this process; return the reason if it failed, or None."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                WORKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **self.environment},
                start_new_session=True,  # Ctrl-C reaches only the comparison, which ends its workers
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            return f"its process ended with status {self.process.wait()}"
        reason: str | None = json.loads(line)["done"]
        return reason

    def end(self) -> None:
        """End the process and what it has started."""
        if self.process is None or self.process.poll() is not None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sign)
                self.process.wait(timeout=10)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


def environments(parallel: int, gpus: Sequence[str], cores: int) -> list[dict[str, str]]:
    """Distribute GPUs or CPU cores over processes.

    Args:
        parallel: The number of processes.
        gpus: The GPUs, named as in CUDA_VISIBLE_DEVICES.
        cores: The number of CPU cores.

    Returns:
        The environment variables of each process.

    >>> environments(3, ["0", "1"], 12)[2]
    {'OMP_NUM_THREADS': '4', 'CUDA_VISIBLE_DEVICES': '0'}
    """
    threads = {"OMP_NUM_THREADS": str(max(1, cores // parallel))}
    return [
        {**threads, **({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {})}
        for number in range(parallel)
    ]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(number) for number in range(count)]


def train_side_by_side(comparison: Comparison, runs: Sequence[Run], what: str, save: bool, parallel: int) -> None:
    """Train runs, several at a time.

    A line is printed for each finished run. The output of a run goes to ``log.txt`` in its folder.

    Raises:
        ValueError: If runs failed, once all others are finished.
    """
    logs = comparison.output / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    shared = {"fit": comparison.fit, "methods": comparison.methods, "output": str(comparison.output), "save": save}
    left: queue.SimpleQueue[Run] = queue.SimpleQueue()
    for run in runs:
        left.put(run)
    console, failed, lock = Console(), list[str](), threading.Lock()
    done = 0

    def collect(run: Run) -> None:
        (logs / f"{run.name}.txt").replace(comparison.output / run.name / LOG)
        run.read(comparison.output / run.name)

    def finish(run: Run, reason: str | None) -> None:
        nonlocal done
        log = logs / f"{run.name}.txt"
        with lock:
            done += 1
            if reason is None:
                text = f"val_loss {run.last['val_loss']:.4f}, {run.last['seconds'] / 60:.1f} minutes"
            else:
                failed.append(f"{run.name} ({reason.rstrip('.')}; {log})")
                text = f"failed: {reason}"
            console.print(f"{what}, {done} of {len(runs)}: {run.name}: {text}", markup=False, highlight=False)

    def job_of(run: Run) -> dict[str, Any]:
        named = {name: asdict(run)[name] for name in ("method", "learning_rate", "seed")}
        return {**shared, "run": named, "log": str(logs / f"{run.name}.txt")}

    workers = [Worker(environment) for environment in environments(parallel, visible_gpus(), os.cpu_count() or 1)]
    threads = [
        threading.Thread(target=_work, args=(worker, left, job_of, collect, finish), daemon=True)
        for worker in workers[: len(runs)]
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # with a timeout, as otherwise Ctrl-C would not be handled
                thread.join(0.2)
    finally:
        while not left.empty():
            left.get_nowait()
        for worker in workers:
            worker.end()
    if failed:
        raise InvalidInputError(
            f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}. The same command trains them again, and "
            "leaves out those that are finished."
        )
    _remove_if_empty(logs)


def _work(
    worker: Worker,
    left: queue.SimpleQueue[Run],
    job_of: Callable[[Run], dict[str, Any]],
    collect: Callable[[Run], None],
    finish: Callable[[Run, str | None], None],
) -> None:
    while True:
        try:
            run = left.get_nowait()
        except queue.Empty:
            return
        try:
            job = job_of(run)
            Path(job["log"]).write_text("", encoding="utf-8")
            reason = worker.train(job)
            if reason is None:
                collect(run)
        except (OSError, InvalidInputError) as error:
            reason = str(error)
        except Exception as error:  # otherwise the thread would end and silently skip its run
            reason = f"{type(error).__name__}: {error}"
        finish(run, reason)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
