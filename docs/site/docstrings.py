"""A Griffe extension: docstrings as Markdown, with links in place of Sphinx's roles and doctests as code."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from griffe import Extension, Object

sys.path.insert(0, os.path.dirname(__file__))
from public import rooms

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")
DOCTEST = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.M)
ROOMS = rooms()
HOMES = {name: f"{room.module}.{name}" for room in ROOMS for name in room.names}


class Docstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(_as_code, ROLE.sub(_linked, obj.docstring.value))


def _as_code(found: re.Match[str]) -> str:
    return f"{found[1]}```pycon\n{found[0]}\n{found[1]}```"


def _linked(found: re.Match[str]) -> str:
    """Link to what the reference shows: a public name, or a method of one. Everything else is code."""
    parts = found[1].removeprefix("milora_lightning.").split(".")
    if parts[0] in {room.name for room in ROOMS} and len(parts) > 1:
        parts = parts[1:] if parts[1] in HOMES else parts
    shown = f"`{'.'.join(parts)}`"
    return f"[{shown}][{'.'.join([HOMES[parts[0]], *parts[1:]])}]" if parts[0] in HOMES else f"`{found[1]}`"
