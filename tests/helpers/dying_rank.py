"""What test_distributed.py runs to see a rank die: the command line, and a second process that kills itself."""

import helpers.environment  # noqa: F401, I001 (first)
import os
import signal
import sys
from typing import Any

from lightning.pytorch.strategies.launchers import subprocess_script
from torch.distributed.checkpoint import FileSystemWriter

from milora_lightning.adapters import initialization
from milora_lightning.cli.main import main


def die_at(call: int, function: Any) -> Any:
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return dying


if __name__ == "__main__":
    # Lightning would look every 5 seconds, and kill the first process if it saw the death before that one did.
    subprocess_script._launch_process_observer = lambda processes: None
    if os.environ.get("LOCAL_RANK") == "1":
        if sys.argv[1] == "surgery":
            initialization.cached_factors = die_at(3, initialization.cached_factors)
        else:  # two checkpoints are written each time, the second in place of the one before
            FileSystemWriter.write_data = die_at(4, FileSystemWriter.write_data)
    main(sys.argv[2:])
