"""Reading lines that a user types on a terminal, with history, and interrupting answers with Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from milora_lightning.utils.errors import InvalidInputError


@contextmanager
def interruptible() -> Iterator[list[bool]]:
    """Within this context, Ctrl-C on a terminal stops the work; the list is then not empty."""
    cut: list[bool] = []
    try:
        yield cut
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        cut.append(True)


def typed_lines() -> Iterator[str]:
    """Yield the user's lines until Ctrl-D, with a prompt on a terminal."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = _line("> " if terminal else "")
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{_following(terminal)}"
            line.encode()  # half characters stand for bytes that are no UTF-8 where the locale is C
        except UnicodeError as error:
            what = f"What is asked is no text in UTF-8 ({error})."
            if not terminal:  # answers would no longer belong to the lines
                raise InvalidInputError(f"{what} Convert it.") from error
            print(what, file=sys.stderr)
            continue
        except EOFError:
            if terminal:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # discard the line
            if not terminal:
                raise
            print(file=sys.stderr)
            continue
        yield line


def _following(terminal: bool) -> str:
    """Read the next line of a continued line; empty at the end of the input."""
    try:
        return _line(". " if terminal else "")
    except EOFError:
        return ""


def _line(prompt: str) -> str:
    if prompt and sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def edit_lines() -> None:
    """Enable line editing and history with the arrow keys."""
    try:
        import readline  # noqa: F401
    except ImportError:  # not on Windows
        return
