"""What data and models say cannot command a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from milora_lightning.cli.commands.chat import Talk
from milora_lightning.cli.commands.generate import _write
from milora_lightning.cli.commands.preview import has_colours, shown
from milora_lightning.screen.samples import table

EVIL = "a\x1b[2Jb\x9b31m\rc\x07 [red]d[/red] \u05d0\U0001f600"
CONTROLS = set(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def of_samples(file: io.StringIO) -> None:
    sample = {"prompt": EVIL, "instruction": EVIL, "reference": EVIL, "answer": EVIL}
    Console(file=file, color_system=None, width=80).print(table([sample], ["answer"], "answers"))


def of_preview(file: io.StringIO) -> None:
    example = {"input_ids": list(map(ord, EVIL * 2)), "spans": [len(EVIL), 2 * len(EVIL)]}
    Console(file=file, color_system=None, width=80).print(shown(example, Characters(), 100, False))


def of_generate(file: io.StringIO) -> None:
    _write(file, [{}], [[EVIL]], as_json=False, first=True)


@pytest.mark.parametrize("show", [of_samples, of_preview, of_generate])
def test_control_characters_are_signs(show: Any) -> None:
    file = Terminal()
    show(file)
    assert not CONTROLS & set(file.getvalue())
    assert "a␛[2Jb�31m␍c␇ [red]d[/red] \u05d0\U0001f600" in file.getvalue().replace("m c", "m␍c")


def test_chat_shows_signs_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stdout", file)
        Talk._write(None, EVIL)  # type: ignore[arg-type]
        assert (file.getvalue() == EVIL) == (not file.isatty())
        assert bool(CONTROLS & set(file.getvalue())) == (not file.isatty())
    file = io.StringIO()
    of_generate(file)
    assert file.getvalue() == f"{EVIL}\n"  # as it is, for whatever reads it


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_what_is_learned_is_marked_where_there_are_no_colours(variables: dict[str, str]) -> None:
    console = Console(file=Terminal(), force_terminal=True, _environ=variables)
    assert not has_colours(console)
    assert has_colours(Console(file=Terminal(), force_terminal=True, _environ={"TERM": "xterm"}))


@pytest.mark.parametrize(("term", "dims"), [("xterm", True), ("dumb", False)])
def test_notes_of_chat_have_no_codes_on_a_terminal_that_knows_none(
    term: str, dims: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Terminal()
    monkeypatch.setattr("sys.stderr", file)
    monkeypatch.setenv("TERM", term)
    Talk.note(None, "Hi")  # type: ignore[arg-type]
    assert ("\x1b" in file.getvalue()) == dims
