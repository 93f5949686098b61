"""Fields that are first filled where the format has long been recognised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.data_fixtures import isolate_cache

from milora_lightning.data import Files
from milora_lightning.data.reading.rows import BEGINNING

ROW = {"instruction": "Add.", "output": "3"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)


def written(folder: Path, **late: Any) -> str:
    """A file whose last row alone has a field."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*[ROW] * BEGINNING, {**ROW, **late}]))
    return str(path)


@pytest.mark.parametrize(("options", "read"), [({"input_field": None}, ""), ({"input_field": "input"}, "1 and 2")])
def test_a_late_field_is_left_out_or_read_where_the_user_says_so(
    options: dict[str, Any], read: str, tmp_path: Path
) -> None:
    path = written(tmp_path, input="1 and 2")
    data = Files(train=path, validation_size=0, **options).load("train")
    assert data is not None
    assert data["input"][:] == [*[""] * BEGINNING, read]
    with pytest.raises(ValueError, match=rf"'input' in row {BEGINNING + 1} .* Set input_field: input, or null"):
        Files(train=path, validation_size=0).load("train")


@pytest.mark.parametrize("field", ["system", "tools"])
def test_a_late_field_of_conversations_is_left_out_where_the_user_says_so(field: str, tmp_path: Path) -> None:
    path = written(tmp_path, **{field: "Be brief."})
    data = Files(train=path, validation_size=0, **{f"{field}_field": None}).load("train")  # type: ignore[arg-type]
    assert data is not None
    assert data["response"][:] == ["3"] * (BEGINNING + 1)
    with pytest.raises(ValueError, match=f"Set {field}_field: {field}, or null"):
        Files(train=path, validation_size=0).load("train")


@pytest.mark.parametrize("field", ["system", "tools"])
@pytest.mark.parametrize("empty", ["", None])
def test_a_field_that_is_empty_at_first_is_as_late_as_one_that_is_missing(
    field: str, empty: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [*[{**ROW, field: empty}] * BEGINNING, {**ROW, field: "1 and 2"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"'{field}' in row {BEGINNING + 1} .* Set {field}_field: {field}, or null"):
        Files(train=str(path), validation_size=0).load("train")
