"""The files that are the method stay short, and reach no special case that they need not know."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import milora_lightning

PACKAGE = Path(milora_lightning.__file__).parent
METHOD = [
    "config",
    "linalg/singular",
    "adapters/factors",
    "adapters/layer",
    "adapters/targets",
    "adapters/injection",
    "adapters/initialization",
    "callbacks/milora_init",
]

OF_LAYER = {"adapter_state", "autograd", "dropout", "factors", "fused", "linear_layers", "merged_product"}
OF_EXPERTS = OF_LAYER | {"added_update", "experts", "held_weight", "layer", "low_rank_sum"}
HELD = OF_EXPERTS | {"attention", "packed"}  # weights that no layer holds, of experts and of attention
KINDS = {"convolution", "embedding", "freezing", "kinds"}

REACHED = {
    "config": set(),
    "linalg/singular": set(),
    "adapters/factors": set(),
    "adapters/layer": OF_LAYER,
    "adapters/targets": HELD | {"candidates", "freezing", "misfits", "parts", "target_errors", "tied"},
    "adapters/injection": HELD | KINDS,
    "adapters/initialization": HELD
    | KINDS
    | {"base_weight", "decomposing", "factor_cache", "injection", "matrices", "quantization"},
}
"""Which other files of ``adapters`` each file of the method imports, directly or through others."""

BELOW = {"config", "linalg", "parallel", "starts", "utils"}
"""The rooms that the method's files in ``adapters`` may reach."""

NOT_FOR_A_CALLBACK = {"analysis", "cli", "comparison", "inference", "module", "screen"}
"""Rooms that the callback does without. What it needs of the others is in docs/architecture.md."""


@cache
def imported(name: str) -> set[str]:
    """The files of this package that a file imports, also within functions."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    paths = {
        m.removeprefix("milora_lightning.").replace(".", "/") for m in modules if m.startswith("milora_lightning.")
    }
    return {path if (PACKAGE / f"{path}.py").exists() else f"{path}/__init__" for path in paths}


def closure(name: str) -> set[str]:
    """All files that are imported with a file, and the file."""
    found, pending = set(), [name]
    while pending:
        if (current := pending.pop()) not in found:
            found.add(current)
            pending += imported(current)
    return found


def rooms(files: set[str]) -> set[str]:
    return {file.partition("/")[0] for file in files}


def test_the_method_can_be_read_in_half_an_hour() -> None:
    lines = {name: len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in METHOD}
    assert sum(lines.values()) <= 1120, lines
    assert max(lines.values()) <= 230, lines


@pytest.mark.parametrize("name", REACHED)
def test_what_a_file_of_the_method_reaches(name: str) -> None:
    reached = closure(name) - {name}
    others = {path.partition("/")[2] for path in reached if path.startswith("adapters/")}
    assert others <= REACHED[name]
    assert rooms(reached) <= BELOW | {"adapters"}


def test_the_callback_reaches_nothing_of_the_command_line() -> None:
    assert not rooms(closure("callbacks/milora_init")) & NOT_FOR_A_CALLBACK


def test_special_cases_are_seen_where_they_are_imported() -> None:
    assert closure("adapters/surgery") >= {f"adapters/{name}" for name in ("checks", "coverage", "frozen_statistics")}
    assert "adapters/split" in closure("models/tensor_parallel")
    assert rooms(closure("callbacks/progress")) >= {"screen", "training"}
