"""What the tests of command line share."""

from __future__ import annotations

from typing import Any

from milora_lightning.cli.main import main


def run(*args: str) -> Any:
    return main(list(args))
