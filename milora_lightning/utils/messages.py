"""What is said to the user, and where: the one place that decides it.

- What a command was called for, answers, tables and where results are, goes to standard output: ``print``, or Rich.
- What the user is told beside it is a record of the logger ``milora_lightning``, at level INFO: :func:`inform`. It goes
  to standard error as it is, until the logger is given other handlers or another level.
- What the user should act on is a Python warning, which filters take or leave: :func:`warn`.

Of several ranks the first speaks.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from typing import TextIO

import torch.distributed as dist

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


def inform(text: str) -> None:
    """Tell the user something that asks for nothing."""
    if is_first_rank():
        _logger().info(text)


def warn(text: str, from_any_rank: bool = False) -> None:
    """Tell the user of something to act on; from the same line, the same text is shown once.

    Args:
        text: The warning.
        from_any_rank: Whether others than the first speak, too: of what one of them alone has met.
    """
    if from_any_rank or is_first_rank():
        warnings.warn(text, stacklevel=2)


def warn_once(owner: object, text: str) -> None:
    """Tell the user of something about an object to act on, unless that was said of it before.

    Python's own filters forget what was shown whenever somebody changes them for a while.

    Args:
        owner: Such as a model: another one of the same kind may do with the same words.
        text: The warning.
    """
    said: set[str] = vars(owner).setdefault("_warned_of", set())
    if text not in said:
        said.add(text)
        if is_first_rank():
            warnings.warn(text, stacklevel=2)


def is_first_rank() -> bool:
    """Whether this process speaks for its run: launchers say its rank before torch knows it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return all(os.environ.get(name, "0") in ("", "0") for name in _RANKS)


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what is ``sys.stderr`` at the time: progress bars and tests replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


@functools.cache
def _logger() -> logging.Logger:
    """Return the package's logger, able to be heard; whoever has given it handlers or a level before is left alone."""
    logger = logging.getLogger("milora_lightning")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_ToStderr())
        logger.propagate = False
    return logger
