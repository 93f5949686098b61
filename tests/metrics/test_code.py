"""Generated programs: what is run of an answer, what a program may do, and estimates from several samples."""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path

import pytest

from milora_lightning.metrics import PassRate, pass_at_k, pass_rates
from milora_lightning.metrics.code import Problem, passes
from milora_lightning.metrics.sandbox import Limits, require_sandbox, runs

PROBLEM = Problem(
    "import math\n\ndef helper(x):\n    return x + 1\n\ndef area(r: float) -> float:\n    '''Area of a circle.'''\n",
    "area",
    "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-3\n    assert candidate(0) == 0",
)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return math.pi * r**2", True),  # a continuation
        ("return math.pi * r**2", True),  # without its indentation
        ("   if r:\n        return math.pi * r**2\n    return 0", True),  # of which decoding took the first space
        ("if r:\n        return math.pi * r**2\n    return 0", True),  # or the first line's indentation
        ("    return math.pi * r**2\n\nprint(area('x'))", True),  # which goes on
        ("Here it is:\n```python\ndef area(r):\n    return math.pi * r * r\n```\nHope it helps!", True),
        ("```\nimport math\ndef area(r):\n    return math.pi * r * r", True),  # cut off by the length limit
        ("```python\n    return math.pi * r * r\n```", True),
        (
            "```python\nhelper(1)\n```\nand so\n```python\ndef area(r):\n    return (helper(r)-1)**2 * math.pi\n```",
            True,
        ),
        (  # with a helper in a block of its own, and an example
            "```python\nTWO = 2\n\ndef square(x):\n    return x**TWO\n```\nThen\n```python\ndef area(r):\n"
            "    return square(r) * math.pi\n```\nFor example:\n```python\na = area(2)\n```",
            True,
        ),
        ("Sure.\n\nfrom math import pi\n\ndef area(r):\n    return pi * r * r\n\nThis is right.", True),
        ("    return 3 * r**2", False),
        ("    return", False),
        ("I do not know.", False),
        ("", False),
    ],
)
def test_answers_are_run_with_the_tests_of_their_problem(answer: str, right: bool) -> None:
    assert passes(answer, PROBLEM.written()) == right


def test_a_program_has_limits(tmp_path: Path) -> None:
    limits = Limits(seconds=1.0, memory_gb=0.5)
    start = time.monotonic()
    assert not runs("while True: pass", limits)
    assert not runs("import time; time.sleep(60)", limits)
    assert time.monotonic() - start < 20
    assert not runs("x = bytearray(2**30)", limits)
    assert runs("x = bytearray(2**26)", limits)
    kept = tmp_path / "kept"
    kept.write_text("mine")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for program in (
            f"open({str(kept)!r}, 'w')",
            f"import os; os.remove({str(kept)!r})",
            f"import shutil; shutil.rmtree({str(tmp_path)!r})",
            "import subprocess; subprocess.run(['true'], check=True)",
            "import os; os.fork()",
            "import os; os.kill(os.getppid(), 9)",
            "import os; os.chdir('/')",
            f"import socket; socket.create_connection(('127.0.0.1', {port}))",
            "import os; os._exit(0)",
            "raise SystemExit(0)",
        ):
            assert not runs(program), program
    assert kept.read_text() == "mine"


def test_a_program_may_do_what_solutions_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert runs(
        "import asyncio, math, re, collections, threading\nasync def f(): return 1\nassert asyncio.run(f()) == 1"
    )
    assert runs("open('a.txt', 'w').write('x')\nimport os\nos.remove('a.txt')\nprint('shown to nobody')")
    assert runs("import os; assert 'SECRET_TOKEN' not in os.environ")


def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    before = set(os.listdir("/tmp"))
    assert runs("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=False).start()")
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("milora-program-")]


def test_the_rate_is_the_mean_of_what_passes() -> None:
    metric = PassRate()
    metric.update(["    return math.pi * r**2", "    return 3", "    return 1 / 0"], [PROBLEM.written()] * 3)
    assert metric.compute()["pass@1"] == pytest.approx(1 / 3)
    metric.update(["    return math.pi * r**2"], [PROBLEM.written()])
    assert metric.compute()["pass@1"] == pytest.approx(2 / 4)
    with pytest.raises(ValueError, match="1 generated texts but 2 references"):
        metric.update(["x"], ["y", "z"])
    with pytest.raises(ValueError, match=r"no problem of HumanEval's format.*num_generation_examples: 0"):
        metric.update(["x"], ["a solution"])


@pytest.mark.parametrize(("samples", "right"), [(5, 0), (5, 2), (6, 5), (4, 4)])
def test_the_estimate_is_the_mean_over_all_choices(samples: int, right: int) -> None:
    passed = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        chosen = list(itertools.combinations(passed, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_estimates_need_enough_samples() -> None:
    assert pass_rates({"a": [True, False], "b": [True] * 10}) == {"pass@1": 0.75}
    assert pass_rates({}) == {}
    with pytest.raises(ValueError, match="pass@3 cannot be estimated from 1 right ones of 2"):
        pass_at_k(2, 1, 3)


def test_systems_without_forks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_sandbox()
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ModuleNotFoundError, match="score them on Linux or macOS"):
        require_sandbox()
