"""What pyproject.toml declares: all that the package imports, and versions that both sets of pinned ones agree with."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOR_DEVELOPERS = {"dev", "docs", "benchmarks", "mutants"}
OTHER_NAMES = {"yaml": "pyyaml", "PIL": "pillow"}
"""Modules that are not named as the distribution that brings them."""

NEEDS_AN_EXTRA = {"plots.py"}
"""Files that are imported only where what they are for is asked for."""


def imported(tree: ast.AST, at_once: bool = True) -> Iterator[tuple[str, bool]]:
    """What a file imports from outside of the package, and whether it does as soon as the file is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module), at_once
        only_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from imported(node, at_once and not only_types and not isinstance(node, ast.FunctionDef))


def distributions(source: str) -> set[tuple[str, bool]]:
    found = {(name.partition(".")[0], at_once) for name, at_once in imported(ast.parse(source))}
    return {
        (canonicalize_name(OTHER_NAMES.get(name, name)), at_once)
        for name, at_once in found
        if name not in {"milora_lightning", *sys.stdlib_module_names}
    }


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])


@pytest.fixture(scope="module")
def imports() -> set[tuple[str, bool]]:
    found = set()
    for path in (ROOT / "milora_lightning").rglob("*.py"):
        for name, at_once in distributions(path.read_text(encoding="utf-8")):
            found.add((name, at_once and path.name not in NEEDS_AN_EXTRA))
    return found


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(each).name) for each in requirements}


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split(";")[0].strip().split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_all_that_is_imported_is_declared(project: dict[str, Any], imports: set[tuple[str, bool]]) -> None:
    always = names(project["dependencies"])
    extras = {extra: names(each) for extra, each in project["optional-dependencies"].items()}
    sometimes = set().union(*(each for extra, each in extras.items() if extra not in FOR_DEVELOPERS))
    assert {name for name, at_once in imports if at_once} <= always
    assert {name for name, _ in imports} <= always | sometimes
    assert always <= {name for name, _ in imports}, "a dependency that no file imports"


def test_where_an_import_stands_is_seen() -> None:
    source = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d import e\nclass G:\n    import yaml\n"
    assert distributions(source) == {("a", True), ("c", False), ("d", False), ("pyyaml", True)}


def test_the_lowest_versions_are_pinned_for_the_tests_with_them(project: dict[str, Any]) -> None:
    tested = pins("constraints-lowest.txt")
    bounds = declared(project, "dev")
    assert [str(each) for each in bounds if floor(each) != tested[canonicalize_name(each.name)]] == []


def test_the_newest_versions_that_are_pinned_are_within_the_bounds(project: dict[str, Any]) -> None:
    used = pins("constraints.txt")
    bounds = declared(project, "dev", "docs")
    assert [str(each) for each in bounds if used[canonicalize_name(each.name)] not in each.specifier] == []


def declared(project: dict[str, Any], *extras: str) -> list[Requirement]:
    """The requirements of the package with some extras, and with what these name of its other extras."""
    listed = [*project["dependencies"]]
    for extra in extras:
        listed += project["optional-dependencies"][extra]
    requirements = [Requirement(each) for each in listed]
    own = [each for each in requirements if each.name == project["name"]]
    others = sorted(set().union(*(each.extras for each in own)))
    more = [Requirement(each) for extra in others for each in project["optional-dependencies"][extra]]
    return [each for each in [*requirements, *more] if each.name != project["name"]]


def floor(requirement: Requirement) -> Version:
    (lowest,) = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
    return lowest
