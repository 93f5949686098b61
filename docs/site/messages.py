"""All messages of the package, read from its sources: the page that lists what the troubleshooting page explains."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from public import PACKAGE

PAGE = "messages.md"
SAYS = {"warn": "warning", "warn_once": "warning", "inform": "note"}
"""The package's functions that say something, and what that is; errors are raised."""


@functools.cache
def messages(package: Path = PACKAGE) -> dict[str, list[tuple[str, str]]]:
    """Return the messages of each room: what each is, and its text, with … for what is filled in."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    errors = {name for text in sources.values() for name in re.findall(r"^class (\w+)\(.*Error\b.*\):$", text, re.M)}
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for path, text in sources.items():
        room = path.relative_to(package).parts[0].removesuffix(".py")
        found[room] |= set(said(ast.parse(text), {"MiLoRAError", *errors}))
    return {room: sorted(each, key=lambda pair: pair[1].lower()) for room, each in found.items() if each}


def said(tree: ast.AST, errors: set[str]) -> Iterator[tuple[str, str]]:
    """Yield what a module raises and says, itself or by a function of its own that is given the text."""
    own: dict[str, tuple[str, int]] = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            names = [argument.arg for argument in function.args.args]
            for kind, text in calls(function, errors, own):
                if isinstance(text, ast.Name) and text.id in names:
                    own[function.name] = kind, names.index(text.id)
    for kind, argument in calls(tree, errors, own):
        text = " ".join(words(argument).split())
        if re.search(r"\w{3}.*\w{3}", text):
            yield kind, text


def calls(tree: ast.AST, errors: set[str], own: dict[str, tuple[str, int]]) -> Iterator[tuple[str, ast.expr]]:
    """Yield the kind and the text of each call that raises or says something."""
    known = {**{name: (kind, 0) for name, kind in SAYS.items()}, "warn_once": ("warning", 1), **own}
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            name = call.func.id
            kind, place = (name, 0) if isinstance(node, ast.Raise) and name in errors else known.get(name, ("", 0))
            if kind and len(call.args) > place:
                yield kind, call.args[place]


def words(node: ast.expr) -> str:
    """Return the text of an expression, with … for what is filled in.

    >>> words(ast.parse("f'There is no {kind} {name!r}' + end", mode="eval").body)
    'There is no … ……'
    """
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return words(node.left) + words(node.right) if isinstance(node, ast.BinOp) else "…"


def page() -> str:
    """Return the page."""
    parts = [
        "# All messages",
        "Every error (by its kind), warning and note that the package has a sentence for, by the room that "
        "says it, with … for names and numbers. They say themselves what to do; [troubleshooting](troubleshooting.md) "
        "tells more of the causes of those that are met most.",
    ]
    for room, found in messages().items():
        rows = [f"| {kind} | {shown(text)} |" for kind, text in found]
        parts.append("\n".join([f"## {room}\n", "| | it says |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def shown(text: str) -> str:
    """Return a text as code in a cell of a table."""
    mark = "``" if "`" in text else "`"
    return f"{mark}{' ' * (len(mark) - 1)}{text}{' ' * (len(mark) - 1)}{mark}".replace("|", "\\|")
