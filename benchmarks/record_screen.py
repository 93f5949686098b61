"""Record what a command shows on a terminal, or writes into pipes, as text.

    python benchmarks/record_screen.py 80 fit --config milora.yaml
    python benchmarks/record_screen.py pipe chat --ckpt_path runs/milora/last.ckpt < questions.txt

On a terminal of so many columns it prints the screen whenever something else is being done, and the last one. What is
done is told by the first words of the moving lines, so that a recording has one screen of each kind and not hundreds.
Of pipes it prints what came out of standard output and what of standard error.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from bisect import bisect
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers.terminal import run_in_terminal  # noqa: E402

KINDS = (
    *("Preparing the data", "Loading the model", "Initializing adapters", "Evaluating before training"),
    *("answering", "Training", "Validating", "Testing", "Predicting"),
)


def kind(lines: list[str]) -> tuple[str, ...]:
    """Tell by which words the moving lines can be known."""
    return tuple(
        word for word in KINDS if any(re.search(rf"[⠀-⣿] {word}|^ +{word}|{word} \d+ pr", line) for line in lines)
    )


def main() -> None:
    command = [sys.executable, "main.py", *sys.argv[2:]]
    os.chdir(ROOT)
    if sys.argv[1] == "pipe":
        record_pipes(command)
    else:
        record_terminal(command, int(sys.argv[1]))


def record_pipes(command: list[str]) -> None:
    """Show what a command writes to standard output and to standard error, control characters made visible."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for title, text in (("standard output", done.stdout), ("standard error", done.stderr)):
        show(
            title,
            [line.encode("unicode_escape").decode() if not line.isprintable() else line for line in text.split("\n")],
        )
    print(f"exit status {done.returncode}")


def record_terminal(command: list[str], columns: int) -> None:
    """Show the screens of a command."""
    recording = run_in_terminal(lambda: os.execv(command[0], command), columns, rows=30, limit=7200)
    seen: set[tuple[str, ...]] = set()
    for at, lines in recording.screens:
        if kind(lines) and kind(lines) not in seen:
            seen.add(kind(lines))
            show(f"after {at:.0f} s", lines)
    show("the last screen", recording.screens[-1][1])
    screens = recording.screens
    times = [at for at, _ in screens]
    later = [bisect(times, at + 5.0) for at in times]  # the first screen that is five seconds younger
    same = [f"{times[i]:.0f} s" for i, j in enumerate(later) if j < len(screens) - 1 and screens[i][1] == screens[j][1]]
    print(f"exit status {recording.status}; screens that were the same five seconds later: {len(same)} {same[:9]}")


def show(title: str, lines: list[str]) -> None:
    text = "\n".join(line.rstrip() for line in lines).strip("\n")
    print(f"{title}:\n\n```text\n{text}\n```\n")


if __name__ == "__main__":
    main()
