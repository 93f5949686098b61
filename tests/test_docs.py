"""README and docs name what exists: pages, sections, commands, and what Python blocks import."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from milora_lightning.cli.commands import COMMANDS, LIGHTNING

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks/results").glob("*.md"))]

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_links(path: Path) -> list[str]:
    """Links to files that are not there, or to sections that those do not have."""
    missing = []
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]*))?\)", path.read_text(encoding="utf-8")):
        if target.startswith(("http", "mailto")):
            continue
        there = (path.parent / target).resolve() if target else path
        if not there.exists() or (anchor and anchor not in anchors(there.read_text(encoding="utf-8"))):
            missing.append(f"{target}#{anchor}")
    return missing


@page
def test_links_lead_somewhere(page: Path) -> None:
    assert missing_links(page) == []


def test_links_that_lead_nowhere_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# One thing\n[b](b.md) [one](#one-thing) [two](#two) [web](https://example.org/c.md)")
    assert missing_links(page) == ["b.md#", "#two"]


@page
def test_python_blocks_import_what_there_is(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("milora_lightning"):
                for alias in node.names:
                    assert hasattr(import_module(str(node.module)), alias.name), alias.name


@page
def test_commands_exist(page: Path) -> None:
    called = set(re.findall(r"(?:main\.py|^milora) ([a-z]+) +-", page.read_text(encoding="utf-8"), re.M))
    assert called <= {*COMMANDS, *LIGHTNING}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
