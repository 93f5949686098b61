"""What is offered can be imported by its name, and brings along no more than it needs."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ForwardRef, Literal, get_args, get_origin

import pytest

import milora_lightning

HEAVY = {"accelerate", "datasets", "lightning", "matplotlib", "peft", "torchmetrics", "transformers"}


def test_type_checkers_read_the_same_names() -> None:
    tree = ast.parse(Path(milora_lightning.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    read = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert read == milora_lightning._HOMES
    assert all(getattr(milora_lightning, name).__name__ == name for name in milora_lightning.__all__)
    assert set(milora_lightning.__all__) <= set(dir(milora_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'MiLoRAInitt'"):
        milora_lightning.MiLoRAInitt  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "brings"),
    [
        ("import milora_lightning", set()),
        ("from milora_lightning import singular_slice, LoRAConfig", {"torch", "scipy"}),
        ("import milora_lightning, matplotlib", {"matplotlib"}),  # to see that this sees it
    ],
)
def test_what_an_import_brings_along(statement: str, brings: set[str]) -> None:
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    found = set(done.stdout.split())
    assert brings <= found
    assert HEAVY & found == HEAVY & brings
    assert "torch" in brings or "torch" not in found


def names_to_be_found(alias: Any) -> Iterator[Any]:
    """The parts of a type that are given as a text."""
    if get_origin(alias) is not Literal:
        for part in get_args(alias):
            yield from [part] if isinstance(part, (str, ForwardRef)) else names_to_be_found(part)


def test_types_with_a_name_hold_no_texts() -> None:
    """For a text that it cannot look up, jsonargparse searches all modules there are: half of a command's start."""
    assert list(names_to_be_found(dict[str, list["str | None"]])) == ["str | None"]
    found = []
    for each in pkgutil.walk_packages(milora_lightning.__path__, "milora_lightning."):
        if not each.name.endswith("__main__"):
            names = vars(importlib.import_module(each.name)).items()
            found += [(each.name, name) for name, value in names if any(names_to_be_found(value))]
    assert not found
