"""Large plain texts are read in parts, of which none is lost, cut within a line or counted twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_lightning.data.reading import records
from milora_lightning.data.reading.records import read_records


@pytest.mark.parametrize("end", ["", "\n", "the last line, longer than any\n", "\n\n"])
def test_a_large_text_is_parts_of_whole_lines_with_numbers_of_their_own(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST_TEXT", 20)
    text = "".join(f"line {i}\n" for i in range(10)) + end
    (tmp_path / "text.txt").write_text(text)
    numbers, parts = zip(*read_records(str(tmp_path / "text.txt")), strict=True)
    assert numbers == tuple(range(1, len(parts) + 1))
    texts = [part["text"] for part in parts]
    assert "".join(texts).rstrip() == text.rstrip()
    assert all(part.endswith("\n") for part in texts[:-1])
    assert all(20 <= len(part) < 40 for part in texts[:-1])
    assert all(part.strip() for part in texts)
