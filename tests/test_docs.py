"""README and docs name what exists: pages, sections, results, messages, and what Python blocks import."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.pages import DOCS, PAGES, RESULTS, ROOT, blocks, page, read, site_module

# In this order: the others import the first.
public, outside, site_messages = site_module("public"), site_module("outside"), site_module("messages")
ROOMS = public.rooms()


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_links(path: Path) -> list[str]:
    """Links to files that are not there, or to sections that those do not have."""
    missing = []
    made = {DOCS / "api" / f"{room.name}.md" for room in ROOMS if room.names} | {
        DOCS / outside.EXAMPLES,
        DOCS / outside.INDEX,
        DOCS / site_messages.PAGE,
    }
    text = re.sub(r"^```.*?^```", "", read(path), flags=re.M | re.S)
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]*))?\)", text):
        there = (path.parent / target).resolve() if target else path
        if target.startswith(("http", "mailto")) or there in made:
            continue
        if not there.exists() or (anchor and anchor not in anchors(read(there))):
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
    for block in blocks(read(page), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("milora_lightning"):
                for alias in node.names:
                    assert hasattr(import_module(str(node.module)), alias.name), alias.name


def test_the_navigation_names_pages_that_are_there() -> None:
    nav = read(ROOT / "mkdocs.yml").partition("\nnav:")[2].partition("\ntheme:")[0]
    named = re.findall(r"([\w./]+\.md)$", nav, re.M)
    made = {outside.EXAMPLES, outside.INDEX, site_messages.PAGE, *outside.PAGES}
    assert [name for name in named if name not in made and not (DOCS / name).exists()] == []
    assert len(named) == len(set(named)) > 20


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_public_name_is_described(room: object) -> None:
    module = import_module(room.module)  # type: ignore[attr-defined]
    assert inspect.getdoc(module)
    for name in room.names:  # type: ignore[attr-defined]
        thing = getattr(module, name)
        if not inspect.isclass(thing) and not inspect.isfunction(thing):
            assert constant_described(name, module.__file__), name
            continue
        assert thing.__doc__, name
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            if not member.startswith("_") and isinstance(value, (property, staticmethod, classmethod)):
                value = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if not member.startswith("_") and inspect.isfunction(value):
                assert inspect.getdoc(value), f"{name}.{member}"


def constant_described(name: str, init: str) -> bool:
    """Whether a string stands behind the assignment of a constant, where it is defined."""
    tree = ast.parse(read(Path(init)))
    home = next(n.module for n in tree.body if isinstance(n, ast.ImportFrom) and name in [a.name for a in n.names])
    body = ast.parse(read(Path(str(import_module(str(home)).__file__)))).body
    return any(
        isinstance(node, (ast.Assign, ast.AnnAssign))
        and name in [getattr(t, "id", "") for t in (node.targets if isinstance(node, ast.Assign) else [node.target])]
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        for node, after in pairwise(body)
    )


def test_the_reference_shows_what_the_rooms_offer() -> None:
    offered = {room.name: room.names for room in ROOMS}
    assert offered["adapters"] == tuple(import_module("milora_lightning.adapters").__all__)
    assert offered["module"] == ("CausalLMModule",)
    shown = {name for names in offered.values() for name in names}
    assert set(import_module("milora_lightning").__all__) <= shown


def test_quoted_results_are_there() -> None:
    quotes = [quote for path in PAGES for quote in re.findall(r"<!-- quote: (\S+) (\S+) -->", read(path))]
    assert quotes
    assert all(outside.quoted(page, name).startswith(("|", "**", "!")) for page, name in quotes)
    with pytest.raises(KeyError, match="no result 'speed_of_light'"):
        outside.quoted(RESULTS[0].name, "speed_of_light")


def test_configs_and_benchmarks_introduce_themselves() -> None:
    for listing in (outside.configs(), outside.scripts()):
        rows = listing.splitlines()[2:]
        assert rows
        assert all(re.fullmatch(r"\| `[^`]+` \| \S.{10,200} \|", row) for row in rows), listing


def test_examples_in_what_makes_the_site() -> None:
    assert doctest.testmod(outside).attempted > 1
    assert doctest.testmod(outside).failed == 0


def test_brackets_of_extras_are_quoted_which_some_shells_expand() -> None:
    installs = re.compile(r"pip install (?:-e |--editable )?[^\s\"'`{]*\[")
    places = [
        *PAGES,
        *public.PACKAGE.rglob("*.py"),
        *(ROOT / "configs").rglob("*.yaml"),
        *(ROOT / "examples").iterdir(),
    ]
    assert installs.search("pip install milora-lightning[eval]")
    assert [str(path) for path in places if path.is_file() and installs.search(read(path))] == []


def test_the_readme_is_short() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= 150


def section(text: str, anchor: str) -> str:
    parts = re.split(r"^(?=## )", text, flags=re.M)
    return next(part for part in parts if anchor in anchors(part))


def test_the_readme_s_figures_are_those_of_the_results() -> None:
    rows = re.findall(r"^\|([^|]+)\|([^|]+)\| \[.*?\]\((benchmarks\S+?)#(\S+?)\) \|$", read(ROOT / "README.md"), re.M)
    assert len(rows) == 4
    for about, says, path, anchor in rows:
        measured = section(read(ROOT / path), anchor)
        for number in re.findall(r"(?<!\w)\d[\d.]*\d", about.partition("of a")[0] + says):
            assert re.search(rf"\b{re.escape(number)}\b", measured), f"{number} of {says!r}"


TROUBLES = read(DOCS / "troubleshooting.md")


def messages() -> str:
    """All texts of the package, with … in place of what is filled in."""
    texts = []
    for path in public.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))  # type: ignore[misc]
    return "\n".join(texts)


def pattern(fragment: str) -> re.Pattern[str]:
    return re.compile(".*?".join(re.escape(part.strip()) for part in fragment.split("…")))


def test_messages_with_a_remedy_are_still_said() -> None:
    said = messages()
    cells = re.findall(r"^\| (`.*?) \| ", TROUBLES.partition("## Starting")[2], re.M)
    shown = [fragment for cell in cells for fragment in re.findall(r"`([^`]+)`", cell)]
    assert len(shown) > 100
    gone = [f for f in shown if f not in said and ("…" not in f or not pattern(f).search(said))]
    assert gone == []


def test_all_messages_are_listed_on_the_site() -> None:
    listed = {text for found in site_messages.messages().values() for _, text in found}
    assert len(listed) > 400
    assert any(text.startswith("The longest example of the … data has") for text in listed)  # by a function of its own
    assert site_messages.page().count("\n| ") == sum(map(len, site_messages.messages().values())) + len(
        site_messages.messages()
    )


def test_every_kind_of_error_is_described() -> None:
    kinds = set(re.findall(r"^class (\w+)\((?:MiLoRAError|InvalidInputError|MissingFileError)", _sources(), re.M))
    assert len(kinds) > 8
    assert {kind for kind in kinds if f"| `{kind}` |" not in TROUBLES} == set()


def _sources() -> str:
    return "\n".join(read(path) for path in public.PACKAGE.rglob("*.py"))
