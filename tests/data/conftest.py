from __future__ import annotations

import pytest

from milora_lightning.data.files import _say


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of the rows that are read."""
    lines: list[str] = []
    _say.cache_clear()
    monkeypatch.setattr("milora_lightning.data.files.inform", lines.append)
    return lines
