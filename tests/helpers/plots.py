"""Keeps plots as figures, in place of files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure


def kept_figures(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> dict[str, Figure]:
    """Return the plots that a module makes from now on, by the names of their files."""
    made: dict[str, Figure] = {}

    @contextmanager
    def keep(path: Path, width: float, height: float) -> Iterator[Figure]:
        made[path.name] = Figure(figsize=(width, height))
        yield made[path.name]

    monkeypatch.setattr(module, "new_figure", keep)
    return made
