"""Errors that say in one sentence what is wrong, why, and what to do.

All errors that this package raises for its user derive from :class:`MiLoRAError` and from the built-in class that fits.
The command line prints their message only. It prints a traceback for all others, which are bugs.
"""

from __future__ import annotations


class MiLoRAError(Exception):
    """Base class of all errors that this package raises for its user."""


class InvalidInputError(MiLoRAError, ValueError):
    """An option, a file or a model cannot be used."""


class MissingFileError(MiLoRAError, FileNotFoundError):
    """A file, a folder or something on the Hub does not exist."""


class OutputExistsError(MiLoRAError, FileExistsError):
    """The place for a result is already taken."""


class MissingPackageError(MiLoRAError, ModuleNotFoundError):
    """An optional package is needed but not installed."""


def sentence(error: BaseException) -> str | None:
    """Return the message of an error, or of the error that caused it, that is for the user; None if there is none.

    >>> try:
    ...     try:
    ...         raise InvalidInputError("r is -1. Take 16.")
    ...     except InvalidInputError as error:
    ...         raise RuntimeError("loading failed") from error
    ... except RuntimeError as error:
    ...     print(sentence(error), sentence(ValueError("of another package")))
    r is -1. Take 16. None
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, MiLoRAError):
        cause = cause.__cause__
    return None if cause is None else str(cause)
