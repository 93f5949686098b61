"""A process that trains runs of a comparison: it reads jobs from its standard input, and answers on standard output.

Both are lines of JSON. The output of each run goes to a separate file.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from milora_lightning.utils.notices import leave_out


def main() -> None:
    """Train runs until there are no more jobs; exit at once if the comparison ends."""
    leave_out()
    answers = os.fdopen(os.dup(1), "w")
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_receive, args=(jobs,), daemon=True).start()
    while line := jobs.get():
        job = json.loads(line)
        with open(job["log"], "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        _answer(answers, {"done": _train(job)})


def _train(job: dict[str, Any]) -> str | None:
    """Train one run; return a sentence with the reason if it failed, or None."""
    from milora_lightning.cli.comparing.single import Comparison
    from milora_lightning.comparison.runs import Run
    from milora_lightning.utils.errors import sentence

    try:
        comparison = Comparison(job["fit"], job["methods"], Path(job["output"]))
        comparison.train(Run(**job["run"]), job["save"])
    except SystemExit as error:  # an option that cannot be read: the log says which
        return error.code if isinstance(error.code, str) else "its options cannot be read"
    except Exception as error:
        traceback.print_exc()
        return sentence(error) or f"{type(error).__name__}: {error}"
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return None


def _receive(jobs: queue.Queue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(1)


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
