"""The rooms of the package: imports point down only, and each room brings along no more libraries than it needs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import milora_lightning

PACKAGE = Path(milora_lightning.__file__).parent

# From the ground up: a room imports from those before it alone.
ROOMS = [
    "utils",
    "linalg",
    "starts",
    "config",
    "parallel",
    "adapters",
    "models",
    "metrics",
    "screen",
    "checkpoint",
    "statistics",
    "analysis",
    "comparison",
    "data",
    "export",
    "strategies",
    "training",
    "callbacks",
    "module",
    "inference",
    "cli",
]

HEAVY = {"datasets", "lightning", "matplotlib", "peft", "torchmetrics", "transformers"}
BRINGS = {
    **{room: set() for room in ("utils", "linalg", "starts", "config", "parallel", "adapters", "screen")},
    "models": {"transformers"},
    "metrics": {"torchmetrics", "transformers", "matplotlib"},  # torchmetrics imports the other two
}
"""Which of these libraries the lower rooms import."""


def imports(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "milora_lightning" else None


def arrows(package: Path) -> set[tuple[str, str]]:
    """Which room imports from which, as seen in the files."""
    found = set()
    for path in package.rglob("*.py"):
        here = path.relative_to(package).with_suffix("").parts[0]
        for there in {room_of(module) for module in imports(path)} - {None, here}:
            if not here.startswith("__"):
                found.add((here, str(there)))
    return found


def pointing_up(found: set[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(arrow for arrow in found if ROOMS.index(arrow[1]) > ROOMS.index(arrow[0]))


def test_every_room_has_its_floor() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name for name in there if not name.startswith("__")} == set(ROOMS)


def test_no_room_imports_from_above() -> None:
    assert pointing_up(arrows(PACKAGE)) == []


def test_an_arrow_that_points_up_is_seen(tmp_path: Path) -> None:
    (tmp_path / "linalg").mkdir()
    (tmp_path / "linalg" / "a.py").write_text("def f():\n    from milora_lightning.adapters.layer import LoRALinear\n")
    assert pointing_up(arrows(tmp_path)) == [("linalg", "adapters")]


def test_every_room_says_what_it_is_and_what_it_offers() -> None:
    for name in ROOMS:
        path = PACKAGE / name / "__init__.py"
        if path.exists():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert (ast.get_docstring(tree) or "").endswith("."), name
            offered = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
            listed = [
                ast.literal_eval(node.value)
                for node in tree.body
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
            ]
            assert offered == set(*listed or [[]]), name


# One process imports torch, which all need; each room then has a fork of it. Before the rooms that may bring a heavy
# library it is imported here, once for all of them, and those that may bring all come last: what these show is that
# they can be the first of this package.
PROGRAM = """
import importlib, json, os, sys
import torch
for libraries, rooms in json.loads(sys.argv[1]):
    for library in libraries:
        importlib.import_module(library)
    for room in rooms:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            importlib.import_module(f"milora_lightning.{room}")
            print(json.dumps([room, sorted({name.partition(".")[0] for name in sys.modules})]), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, room
"""


@pytest.fixture(scope="module")
def brought() -> dict[str, list[str]]:
    """The libraries that are there after each room has been imported into a process without any other room."""
    light = [room for room, brings in BRINGS.items() if not brings]
    some = sorted(set(BRINGS) - set(light), key=lambda room: len(BRINGS[room]))
    stages = [
        ([], light),
        (["transformers.modeling_utils"], some),
        (["datasets", "lightning.pytorch.cli"], [room for room in ROOMS if room not in BRINGS]),
    ]
    command = [sys.executable, "-c", PROGRAM, json.dumps(stages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_can_be_imported_first_and_brings_no_heavy_library(room: str, brought: dict[str, list[str]]) -> None:
    assert "torch" in brought[room]
    assert HEAVY & set(brought[room]) <= BRINGS.get(room, HEAVY)


def test_a_heavy_library_is_seen(brought: dict[str, list[str]]) -> None:
    """One that a room brings itself."""
    assert "torchmetrics" in brought["metrics"]
    assert "torchmetrics" not in brought["models"]
