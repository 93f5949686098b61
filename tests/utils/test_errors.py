"""Errors that are told in a sentence are told apart from mistakes in a program by their class, and by nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import milora_lightning
from milora_lightning import CheckpointError
from milora_lightning.cli import main as cli
from milora_lightning.utils.errors import InvalidInputError, MiLoRAError, MissingFileError, sentence

PACKAGE = Path(milora_lightning.__file__).parent
# For these there is a class of ours.
TOLD = {"ValueError", "FileNotFoundError", "FileExistsError", "ModuleNotFoundError"}


def raised(tree: ast.AST) -> list[str]:
    calls = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise))
    return [call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]


def test_what_the_package_raises_for_its_user_is_a_class_of_its_own() -> None:
    assert raised(ast.parse("raise ValueError('r is -1')")) == ["ValueError"]
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if (names := TOLD.intersection(raised(ast.parse(path.read_text()))))
    }
    assert not found, "raise a class of milora_lightning.utils.errors, or the command line will print a traceback"


def test_they_can_be_caught_as_what_they_were() -> None:
    assert issubclass(InvalidInputError, ValueError)
    assert issubclass(MissingFileError, FileNotFoundError)
    assert issubclass(CheckpointError, ValueError)
    assert issubclass(CheckpointError, MiLoRAError)
    assert str(MissingFileError("There is no file x.")) == "There is no file x."


def run_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command line meet an error, below a function that is none of the package's."""

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "command_line", lambda *args: [*map(failing, args)])
    cli.main(["fit"])


def wrapped() -> Exception:
    """An error of ours, raised inside another library's callback, which raises its own from it."""
    error = RuntimeError("generating the data set failed")
    error.__cause__ = InvalidInputError("Row 3 has no answer. Add one.")
    return error


@pytest.mark.parametrize("error", [InvalidInputError("Row 3 has no answer. Add one."), wrapped()])
def test_the_command_line_says_the_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^error: Row 3 has no answer\. Add one\.$"):
        run_with(error, monkeypatch)


def test_mistakes_in_a_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ValueError("too many values to unpack")
    assert sentence(error) is None
    with pytest.raises(ValueError, match="too many values") as raised_error:
        run_with(error, monkeypatch)
    assert raised_error.value is error
