"""Runs of a comparison in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import imitated_worker
from helpers.imitated_worker import DIES, FAILS, WAITS

from milora_lightning.cli.comparing import side_by_side, worker
from milora_lightning.cli.comparing.side_by_side import environments, train_side_by_side
from milora_lightning.cli.comparing.single import Comparison
from milora_lightning.comparison.runs import Examples, Run


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.setattr(side_by_side, "WORKER", [sys.executable, imitated_worker.__file__])
    finished = Run("a", 1e-3, 0, [{"step": 0.0, "seconds": 60.0, "val_loss": 1.0}])
    finished.examples = {"val_loss": Examples(np.ones((1, 4)), np.ones(4), np.zeros(1), np.arange(4))}
    (tmp_path / "finished").mkdir()
    finished.write(tmp_path / "finished")
    return Comparison([], {"a": []}, tmp_path / "out")


def runs(*seeds: int) -> list[Run]:
    return [Run("a", 1e-3, seed) for seed in seeds]


def test_every_run_has_its_results_and_its_log(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "visible_gpus", lambda: ["4", "GPU-7"])
    made = runs(0, 1, 2, 3)
    train_side_by_side(comparison, made, "Sweep", False, 2)
    assert all(run.rows and run.examples["val_loss"].means() == 1 for run in made)
    processes = {(comparison.output / run.name / "device").read_text() for run in made}
    assert len(processes) <= 2  # they are kept
    assert {line.split()[-1] for line in processes} <= {"4", "GPU-7"}
    assert (comparison.output / made[3].name / "log.txt").read_text() == "What a run prints.\n"
    assert not (comparison.output / "logs").exists()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"Sweep, {n} of 4" for n in (1, 2, 3, 4)]
    assert {line.rpartition(": ")[2] for line in lines} == {"val_loss 1.0000, 1.0 minutes"}  # of 60 seconds


def test_failures_name_their_runs_and_stop_no_others(comparison: Comparison) -> None:
    made = runs(0, FAILS, DIES, 3)
    with pytest.raises(ValueError, match=r"2 of 4 runs failed: .*has no data.*status 3") as raised:
        train_side_by_side(comparison, made, "Sweep", False, 1)
    assert [bool(run.rows) for run in made] == [True, False, False, True]
    for seed in (FAILS, DIES):
        log = comparison.output / "logs" / f"a-lr0.001-seed{seed}.txt"
        assert str(log) in str(raised.value)
        assert log.read_text() == "What a run prints.\n"


def test_an_interruption_ends_all_processes(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[side_by_side.Worker] = []

    class Noted(side_by_side.Worker):
        def __post_init__(self) -> None:
            started.append(self)

    monkeypatch.setattr(side_by_side, "Worker", Noted)

    def interrupt() -> None:
        while not (comparison.output / "logs" / f"a-lr0.001-seed{WAITS}.txt").exists():
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            train_side_by_side(comparison, runs(WAITS, 5, 6), "Sweep", False, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert all(worker.process is None or worker.process.poll() is not None for worker in started)


def test_cores_are_shared_out() -> None:
    assert [each["OMP_NUM_THREADS"] for each in environments(3, [], 8)] == ["2", "2", "2"]
    assert environments(4, [], 2)[0] == {"OMP_NUM_THREADS": "1"}
    devices = [each["CUDA_VISIBLE_DEVICES"] for each in environments(4, ["0", "2"], 8)]
    assert devices == ["0", "2", "0", "2"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--config", "absent.yaml"], "absent.yaml"), (["--model.name_or_path", "m", "--adapter.r", "x"], "options")],
)
def test_a_worker_says_why_it_could_not_train(options: list[str], reason: str, tmp_path: Path) -> None:
    run = {"method": "a", "learning_rate": 1e-3, "seed": 0}
    job = {"fit": options, "methods": {"a": []}, "output": str(tmp_path), "run": run, "save": False}
    assert reason in str(worker._train(job))
    assert list(tmp_path.iterdir()) == []
