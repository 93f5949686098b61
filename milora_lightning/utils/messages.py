"""Messages to the user, and their destinations.

- The result of a command (answers, tables, paths) goes to standard output: ``print``, or Rich.
- Other information is a record of the logger ``milora_lightning`` at level INFO: :func:`inform`. It is written to
  standard error, unless the logger has other handlers or another level.
- Whatever requires the user's attention is a Python warning, subject to Python's filters: :func:`warn`.

Only the first of several ranks writes messages.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch.distributed as dist

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


def inform(text: str) -> None:
    """Tell the user something that requires no action."""
    if is_first_rank():
        _logger().info(text)


def warn(text: str, from_any_rank: bool = False) -> None:
    """Warn the user; the same text from the same line is shown once.

    Args:
        text: The warning.
        from_any_rank: Whether ranks other than the first also warn, of something that may concern only them.
    """
    if from_any_rank or is_first_rank():
        warnings.warn(text, stacklevel=2)


def warn_once(owner: object, text: str) -> None:
    """Warn the user about an object, once for each object and text.

    (Python's filters alone would repeat a warning after they were changed temporarily.)

    Args:
        owner: The object, such as a model.
        text: The warning.
    """
    said: set[str] = vars(owner).setdefault("_warned_of", set())
    if text not in said:
        said.add(text)
        if is_first_rank():
            warnings.warn(text, stacklevel=2)


@contextmanager
def each_said_once() -> Iterator[None]:
    """Show each message once, also warnings of other packages, when several runs in a process would repeat them.

    >>> with warnings.catch_warnings(record=True) as said, each_said_once():
    ...     warnings.simplefilter("always")
    ...     for run in range(3):
    ...         warnings.warn("The data have no answers.", stacklevel=1)
    >>> len(said)
    1
    """
    said: set[str] = set()

    def is_new(text: str) -> bool:
        if text in said:
            return False
        said.add(text)
        return True

    def keep(record: logging.LogRecord) -> bool:
        return is_new(record.getMessage())

    def show(message: Warning | str, *place: Any, **options: Any) -> None:
        if is_new(str(message)):
            before(message, *place, **options)

    before = warnings.showwarning
    _logger().addFilter(keep)
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
        _logger().removeFilter(keep)


def inform_once(owner: object, text: str) -> None:
    """Tell the user something about an object, once for each object and text.

    Args:
        owner: The object, such as a model.
        text: The message.
    """
    said: set[str] = vars(owner).setdefault("_warned_of", set())
    if text not in said:
        said.add(text)
        inform(text)


def is_first_rank() -> bool:
    """Whether this is the first rank; launchers set its environment variable before torch knows the rank."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return all(os.environ.get(name, "0") in ("", "0") for name in _RANKS)


class _ToStderr(logging.StreamHandler):  # type: ignore[type-arg]  # not subscriptable at run time in Python 3.10
    """Writes to the current ``sys.stderr``, which progress bars and tests replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


@functools.cache
def _logger() -> logging.Logger:
    """Return the package's logger, with a handler and a level unless the user has set them."""
    logger = logging.getLogger("milora_lightning")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_ToStderr())
        logger.propagate = False
    return logger
