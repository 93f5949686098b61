"""The files that are the method stay short, and do not import the special cases."""

from __future__ import annotations

import ast
from pathlib import Path

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
SPECIAL = {f"adapters/{name}" for name in ("checks", "coverage", "frozen_statistics", "master_weights", "surgery")}
QUANTIZED_OR_SHARED = {f"adapters/{name}" for name in ("quantization", "base_weight", "factor_cache", "decomposing")}


def imported(name: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module is not None}
    paths = {module.removeprefix("milora_lightning.").replace(".", "/") for module in modules}
    return {path for path in paths if (PACKAGE / f"{path}.py").exists()}


def closure(name: str) -> set[str]:
    found, pending = set(), [name]
    while pending:
        if (current := pending.pop()) not in found:
            found.add(current)
            pending += imported(current)
    return found


def test_the_method_can_be_read_in_half_an_hour() -> None:
    assert sum(len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in METHOD) <= 1350


def test_the_method_does_not_import_special_cases() -> None:
    for name in METHOD[:-1]:
        assert not closure(name) & SPECIAL, name
    for name in METHOD[:-2]:
        assert not closure(name) & QUANTIZED_OR_SHARED, name
    assert closure("adapters/surgery") >= SPECIAL  # which are seen where they are imported
