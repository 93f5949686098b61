"""The package's public names, read from its sources without importing it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "milora_lightning"


@dataclass(frozen=True)
class Room:
    """A subpackage or module, as its page of the reference shows it.

    Attributes:
        name: Its name within the package.
        about: Its docstring.
        names: What it offers.
    """

    name: str
    about: str
    names: tuple[str, ...]

    @property
    def module(self) -> str:
        """Its full name."""
        return f"{PACKAGE.name}.{self.name}"


def rooms(package: Path = PACKAGE) -> list[Room]:
    """Read all rooms: what a folder lists in ``__all__``, and what the package itself offers of a single file."""
    offered: dict[str, list[str]] = constant(package / "__init__.py", "_OFFERED")
    found = []
    for path in sorted(package.iterdir()):
        source = path / "__init__.py" if path.is_dir() else path
        if path.stem.startswith("_") or not source.is_file() or source.suffix != ".py":
            continue
        about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        names = constant(source, "__all__") if path.is_dir() else offered.get(path.stem, [])
        found.append(Room(path.stem, about, tuple(names or ())))
    return found


def constant(path: Path, name: str) -> Any:
    """Return the literal that a file assigns to a name; None if it does not."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    return None
